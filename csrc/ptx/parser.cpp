// PTX text to statements and declarations. An opcode is a name here; decode.cpp gives it a meaning.

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "lexer.h"
#include "syntax.h"

namespace ptx {
namespace {

const char* const kOldest = "sm_80";
constexpr int64_t kMostBytes = int64_t{1} << 31, kMostAlign = 1 << 16;  // of a variable
constexpr int kDeepest = 32;                                            // operands within operands

bool starts_with(const std::string& text, const char* prefix) {
  return text.rfind(prefix, 0) == 0;
}

// Line directives of a function's debugging information may come without a file; unknown words after them are ignored.
Source source_of(const std::string& text) {
  Source s;
  std::istringstream in(text);
  std::string word;
  in >> s.file >> s.line;
  while (in >> word)
    if (word == "inlined_at") in >> s.inlined_file >> s.inlined_line;
  return s;
}

class Parser {
 public:
  Parser(const std::string& text, const std::string& name) : lexer_(text, name) {
    out_.name = name;
  }

  Text run() {
    while (lexer_.peek().kind != Token::kEnd) directive();
    if (out_.version == 0) lexer_.fail("expected .version, got none: is this PTX?");
    if (out_.target.empty()) lexer_.fail(std::string("expected a .target from ") + kOldest + " on, got none");
    return std::move(out_);
  }

 private:
  void directive() {
    const Token token = lexer_.take();
    const std::string& word = token.text;
    if (word == ".version") {
      version();
    } else if (word == ".target") {
      target();
    } else if (word == ".address_size") {
      if (const Token size = lexer_.take(); size.text != "64")
        throw Error(out_.name, size.line, "expected .address_size 64, got " + size.text);
    } else if (word == ".file") {
      file(token);
    } else if (word == ".loc") {
      lexer_.rest_of_line(token);
    } else if (word == ".section") {
      skip_past("{");
      lexer_.skip_braces();
    } else if (word == ".visible" || word == ".extern" || word == ".weak" || word == ".common") {
      external_ = word == ".extern";
    } else if (word == ".entry" || word == ".func") {
      function(word == ".entry", token.line);
      external_ = false;
    } else if (word == ".global" || word == ".const" || word == ".shared") {
      for (Variable& v : variables(word.substr(1))) {
        const std::string name = v.name;
        out_.variables[name] = std::move(v);
      }
      external_ = false;
    } else if (word == ".pragma" || word == ".alias") {
      skip_past(";");
    } else if (word != ";") {
      throw Error(out_.name, token.line, "expected a directive of PTX, got '" + word + "'");
    }
  }

  void skip_past(const char* word) {
    while (!lexer_.take_if(word)) {
      if (lexer_.peek().kind == Token::kEnd)
        lexer_.fail(std::string("expected '") + word + "', got the end of the text");
      lexer_.take();
    }
  }

  void version() {
    const Token token = lexer_.take();
    const size_t dot = token.text.find('.');
    if (dot == std::string::npos) throw Error(out_.name, token.line, "expected .version like 8.8, got " + token.text);
    out_.version = std::atoi(token.text.c_str()) * 10 + std::atoi(token.text.c_str() + dot + 1);
    if (out_.version < 60 || out_.version > 99)
      throw Error(out_.name, token.line,
                  "expected PTX of version 6.0 to 9.9, got " + token.text + "; compile with another ptx_version");
  }

  void target() {
    const Token token = lexer_.take();
    if (!starts_with(token.text, "sm_") || std::atoi(token.text.c_str() + 3) < std::atoi(kOldest + 3))
      throw Error(out_.name, token.line, std::string("expected a .target from ") + kOldest + " on, got " + token.text);
    out_.target = token.text;
    while (lexer_.take_if(",")) lexer_.take();  // "debug", "texmode_independent"
  }

  void file(const Token& directive) {
    const std::string rest = lexer_.rest_of_line(directive);
    const size_t first = rest.find('"'), last = rest.rfind('"');
    if (first != last) out_.files[std::atoi(rest.c_str())] = rest.substr(first + 1, last - first - 1);
  }

  // ---- declarations ----

  int64_t integer() {
    const bool negative = lexer_.take_if("-");
    const Token token = lexer_.take();
    char* end = nullptr;
    const auto value = static_cast<int64_t>(std::strtoull(token.text.c_str(), &end, 0));
    if (end == token.text.c_str()) throw Error(out_.name, token.line, "expected an integer, got '" + token.text + "'");
    return negative ? -value : value;
  }

  // The variables of a declaration whose state space has been taken, up to and with the semicolon.
  std::vector<Variable> variables(const std::string& space) {
    std::vector<Variable> all;
    Variable kind = kind_of(space);
    do {
      all.push_back(variable(kind));
    } while (lexer_.take_if(","));
    lexer_.expect(";");
    return all;
  }

  // Alignment, vector and type.
  Variable kind_of(const std::string& space) {
    Variable v;
    v.space = space;
    for (;;) {
      const Token token = lexer_.peek();
      if (token.kind != Token::kWord || token.text[0] != '.') return v;
      lexer_.take();
      if (token.text == ".align") {
        const int64_t align = integer();
        if (align < 1 || align > kMostAlign || (align & (align - 1)) != 0)
          throw Error(out_.name, token.line,
                      "expected an alignment that is a power of two up to " + std::to_string(kMostAlign) + ", got " +
                          std::to_string(align));
        v.align = static_cast<int>(align);
      } else if (token.text == ".ptr") {
        while (lexer_.peek().is(".global") || lexer_.peek().is(".shared") || lexer_.peek().is(".const") ||
               lexer_.peek().is(".local") || lexer_.peek().is(".align"))
          if (lexer_.take().text == ".align") integer();
      } else if (token.text == ".v2" || token.text == ".v4" || token.text == ".v8") {
        v.vector = token.text[2] - '0';
      } else if (token.text == ".attribute") {
        skip_past(")");
      } else {
        v.type = type_named(token.text.substr(1));
        if (v.type == Type::kNone) throw Error(out_.name, token.line, "expected a type, got '" + token.text + "'");
      }
    }
  }

  Variable variable(const Variable& kind) {
    Variable v = kind;
    const Token name = lexer_.take();
    if (name.kind != Token::kWord) throw Error(out_.name, name.line, "expected a name, got '" + name.text + "'");
    v.name = name.text;
    v.bytes = int64_t{bytes_of(v.type)} * v.vector;
    if (v.align == 0) v.align = std::max<int>(static_cast<int>(v.bytes), 1);
    if (lexer_.take_if("<")) {
      v.count = integer();
      lexer_.expect(">");
    }
    while (lexer_.take_if("[")) {
      if (lexer_.take_if("]")) {
        v.bytes = -1;
      } else {
        const int64_t elements = integer();
        if (elements < 0 || (v.bytes > 0 && elements > kMostBytes / v.bytes))
          throw Error(out_.name, name.line,
                      "expected at most " + std::to_string(kMostBytes) + " bytes of variable " + v.name + ", got " +
                          std::to_string(elements) + " times " + std::to_string(v.bytes));
        v.bytes *= elements;
        lexer_.expect("]");
      }
    }
    if (lexer_.take_if("=")) {
      const Written value = operand();
      v.initial = value.kind == Written::kVector ? value.parts : std::vector<Written>{value};
      if (v.bytes < 0) v.bytes = static_cast<int64_t>(v.initial.size()) * bytes_of(v.type);
    }
    return v;
  }

  std::vector<Variable> parameters() {
    std::vector<Variable> all;
    lexer_.expect("(");
    while (!lexer_.take_if(")")) {
      const Token space = lexer_.take();
      if (!space.is(".param") && !space.is(".reg"))
        throw Error(out_.name, space.line, "expected .param, got '" + space.text + "'");
      all.push_back(variable(kind_of(space.text.substr(1))));
      lexer_.take_if(",");
    }
    return all;
  }

  // ---- functions ----

  void function(bool entry, int line) {
    Function f;
    f.entry = entry;
    f.line = line;
    if (lexer_.peek().is("(")) f.results = parameters();
    f.name = lexer_.take().text;
    if (lexer_.peek().is("(")) f.parameters = parameters();
    while (lexer_.peek().kind == Token::kWord) limits(f);
    if (lexer_.take_if(";")) {  // a declaration; the definition may come later
      out_.functions.emplace(f.name, std::move(f));
      return;
    }
    lexer_.expect("{");
    f.defined = true;
    out_.functions[f.name] = Function{};  // so that a body that refers to it finds it
    body(f);
    const std::string name = f.name;
    out_.functions[name] = std::move(f);
  }

  void limits(Function& f) {
    const Token token = lexer_.take();
    int* into = token.is(".maxntid")             ? f.maximum_threads
                : token.is(".reqntid")           ? f.required_threads
                : token.is(".reqnctapercluster") ? f.required_cluster
                                                 : nullptr;
    if (into == nullptr) {
      if (lexer_.peek().kind == Token::kWord && std::isdigit(lexer_.peek().text[0])) integer();  // .maxnreg 128
      if (token.is(".pragma")) {
        lexer_.take();
        lexer_.take_if(";");
      }
      return;
    }
    into[0] = into[1] = into[2] = 1;
    for (int i = 0; i < 3; ++i) {
      into[i] = static_cast<int>(integer());
      if (!lexer_.take_if(",")) break;
    }
  }

  void body(Function& f) {
    f.scopes.emplace_back();
    for (int scope = 0; scope >= 0;) {
      const Token token = lexer_.take();
      if (token.kind == Token::kEnd) lexer_.fail("expected '}', got the end of the text");
      if (token.is("{")) {
        f.scopes.emplace_back();
        f.scopes.back().parent = scope;
        scope = static_cast<int>(f.scopes.size()) - 1;
      } else if (token.is("}")) {
        scope = f.scopes[scope].parent;
      } else if (token.is(";")) {
        continue;
      } else if (token.text[0] == '.') {
        local_directive(f, scope, token);
      } else if (token.kind == Token::kWord && lexer_.peek().is(":")) {
        lexer_.take();
        label(f, scope, token);
      } else {
        statement(f, scope, token);
      }
    }
  }

  void label(Function& f, int scope, const Token& token) {
    if (lexer_.peek().is(".branchtargets")) {
      lexer_.take();
      std::vector<std::string>& list = f.branch_targets[token.text];
      do {
        list.push_back(lexer_.take().text);
      } while (lexer_.take_if(","));
      lexer_.expect(";");
      return;
    }
    Statement s;
    s.line = token.line;
    s.scope = scope;
    s.label = token.text;
    if (!f.scopes[scope].labels.emplace(token.text, static_cast<int>(f.statements.size())).second)
      throw Error(f.name, token.line, "label " + token.text + " is defined twice");
    f.statements.push_back(std::move(s));
  }

  void local_directive(Function& f, int scope, const Token& token) {
    const std::string& word = token.text;
    if (word == ".loc") {
      const Source source = source_of(lexer_.rest_of_line(token));
      out_.sources.push_back(source);
      return;
    }
    if (word == ".pragma") {
      skip_past(";");
      return;
    }
    if (word != ".reg" && word != ".shared" && word != ".local" && word != ".param" && word != ".const" &&
        word != ".global")
      throw Error(f.name, token.line, "not understood: directive " + word);
    for (Variable& v : variables(word.substr(1))) {
      const std::string name = v.name;
      if (!f.scopes[scope].variables.emplace(name, std::move(v)).second)
        throw Error(f.name, token.line, name + " is declared twice");
    }
  }

  void statement(Function& f, int scope, Token token) {
    Statement s;
    s.line = token.line;
    s.scope = scope;
    s.source = static_cast<int>(out_.sources.size()) - 1;
    if (token.is("@")) {
      s.guard_negated = lexer_.take_if("!");
      s.guard = lexer_.take().text;
      token = lexer_.take();
      s.line = token.line;
    }
    if (token.kind != Token::kWord || !std::isalpha(static_cast<unsigned char>(token.text[0])))
      throw Error(f.name, token.line, "expected an instruction, got '" + token.text + "'");
    s.opcode = token.text;
    while (!lexer_.take_if(";")) {
      if (lexer_.peek().kind == Token::kEnd) lexer_.fail("expected ';', got the end of the text");
      s.operands.push_back(operand());
      if (!lexer_.peek().is(";")) lexer_.expect(",");
    }
    f.statements.push_back(std::move(s));
  }

  // ---- operands ----

  std::vector<Written> parts(const char* close) {
    std::vector<Written> all;
    while (!lexer_.take_if(close)) {
      all.push_back(operand());
      if (!lexer_.peek().is(close)) lexer_.expect(",");
    }
    return all;
  }

  Written operand() {
    if (depth_ == kDeepest) lexer_.fail("expected operands within at most " + std::to_string(kDeepest) + " others");
    ++depth_;
    Written w = operand_within();
    --depth_;
    return w;
  }

  Written operand_within() {
    Written w;
    if (lexer_.take_if("{")) {
      w.kind = Written::kVector;
      w.parts = parts("}");
      return w;
    }
    if (lexer_.take_if("(")) {
      w.kind = Written::kList;
      w.parts = parts(")");
      return w;
    }
    if (lexer_.take_if("[")) return memory();
    if (lexer_.take_if("!")) {
      w = operand();
      w.negated = !w.negated;
      return w;
    }
    const bool negative = lexer_.take_if("-");
    const Token token = lexer_.take();
    if (token.kind != Token::kWord) throw Error(out_.name, token.line, "expected an operand, got '" + token.text + "'");
    if (std::isdigit(static_cast<unsigned char>(token.text[0]))) {
      w = number(token, negative);
    } else {
      w.name = token.text;
      if (lexer_.take_if("+")) w.value = integer();  // symbol+16
    }
    if (lexer_.take_if("|")) {
      Written pair;
      pair.kind = Written::kPair;
      pair.parts = {w, operand()};
      return pair;
    }
    return w;
  }

  Written memory() {
    Written w;
    w.kind = Written::kMemory;
    w.parts.push_back(operand());
    if (w.parts[0].kind == Written::kName) std::swap(w.value, w.parts[0].value);
    while (!lexer_.peek().is("]") && !lexer_.peek().is(",")) {
      if (lexer_.take_if("+")) {
        w.value += integer();
      } else if (lexer_.peek().is("-")) {
        w.value += integer();
      } else {
        lexer_.fail("expected ']', got '" + lexer_.peek().text + "'");
      }
    }
    while (lexer_.take_if(",")) w.parts.push_back(operand());
    lexer_.expect("]");
    return w;
  }

  Written number(const Token& token, bool negative) {
    const std::string& text = token.text;
    Written w;
    w.kind = Written::kInteger;
    char* end = nullptr;
    if (text.size() > 2 && text[0] == '0' && (text[1] == 'f' || text[1] == 'F') && text.size() == 10) {
      w.kind = Written::kFloat;
      w.single = true;
      w.value = static_cast<int64_t>(std::strtoull(text.c_str() + 2, &end, 16));
      if (negative) w.value ^= 0x80000000;
    } else if (text.size() > 2 && text[0] == '0' && (text[1] == 'd' || text[1] == 'D') && text.size() == 18) {
      w.kind = Written::kFloat;
      const uint64_t bits = std::strtoull(text.c_str() + 2, &end, 16);
      w.value = static_cast<int64_t>(negative ? bits ^ (uint64_t{1} << 63) : bits);
    } else if (text.find('.') != std::string::npos) {
      w.kind = Written::kFloat;
      const double value = negative ? -std::strtod(text.c_str(), &end) : std::strtod(text.c_str(), &end);
      std::memcpy(&w.value, &value, sizeof(value));
    } else {
      const bool binary = text.size() > 2 && text[0] == '0' && (text[1] == 'b' || text[1] == 'B');
      const uint64_t value = std::strtoull(text.c_str() + (binary ? 2 : 0), &end, binary ? 2 : 0);
      w.value = static_cast<int64_t>(negative ? -value : value);
      if (*end == 'U') ++end;
    }
    if (*end != '\0') throw Error(out_.name, token.line, "expected a number, got '" + text + "'");
    return w;
  }

  Lexer lexer_;
  Text out_;
  bool external_ = false;
  int depth_ = 0;  // of the operand that is read
};

}  // namespace

Type type_named(std::string_view text) {
  static const std::map<std::string_view, Type> kTypes = {
      {"pred", Type::kPred},   {"b8", Type::kB8},       {"u8", Type::kU8},         {"s8", Type::kS8},
      {"b16", Type::kB16},     {"u16", Type::kU16},     {"s16", Type::kS16},       {"f16", Type::kF16},
      {"bf16", Type::kBF16},   {"b32", Type::kB32},     {"u32", Type::kU32},       {"s32", Type::kS32},
      {"f32", Type::kF32},     {"tf32", Type::kTF32},   {"f16x2", Type::kF16x2},   {"bf16x2", Type::kBF16x2},
      {"u16x2", Type::kU16x2}, {"s16x2", Type::kS16x2}, {"b64", Type::kB64},       {"u64", Type::kU64},
      {"s64", Type::kS64},     {"f64", Type::kF64},     {"e4m3x2", Type::kE4M3x2}, {"e5m2x2", Type::kE5M2x2},
      {"f32x2", Type::kF32x2}, {"b128", Type::kB128}};
  const auto found = kTypes.find(text);
  return found == kTypes.end() ? Type::kNone : found->second;
}

Text parse(const std::string& text, const std::string& name) {
  return Parser(text, name).run();
}

}  // namespace ptx
