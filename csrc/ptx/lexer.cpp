// Words, symbols and strings of PTX text; comments are left out.

#include "lexer.h"

#include <cctype>

#include "syntax.h"

namespace ptx {
namespace {

bool in_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}

}  // namespace

Error::Error(std::string kernel_name, int at, const std::string& what)
    : std::runtime_error(kernel_name + (at > 0 ? ", line " + std::to_string(at) : "") + ": " + what),
      kernel(std::move(kernel_name)),
      line(at) {
}

void Lexer::fail(const std::string& what) const {
  throw Error(module_, next_.line, what);
}

void Lexer::skip_blank() {
  while (at_ < text_.size()) {
    const char c = text_[at_];
    if (c == '\n') {
      ++line_;
      ++at_;
    } else if (std::isspace(static_cast<unsigned char>(c)) || c == '\0') {
      ++at_;
    } else if (text_.compare(at_, 2, "//") == 0) {
      while (at_ < text_.size() && text_[at_] != '\n') ++at_;
    } else if (text_.compare(at_, 2, "/*") == 0) {
      const size_t end = text_.find("*/", at_ + 2);
      if (end == std::string::npos)
        throw Error(module_, line_, "expected the end of a comment, got the end of the text");
      for (; at_ < end + 2; ++at_) line_ += text_[at_] == '\n';
    } else {
      return;
    }
  }
}

void Lexer::advance() {
  skip_blank();
  next_ = Token{};
  next_.line = line_;
  next_at_ = at_;
  if (at_ == text_.size()) return;
  const char c = text_[at_];
  if (c == '"') {
    size_t end = at_ + 1;
    while (end < text_.size() && text_[end] != '"' && text_[end] != '\n') end += text_[end] == '\\' ? 2 : 1;
    if (end >= text_.size() || text_[end] != '"') throw Error(module_, line_, "expected the end of a string");
    next_.kind = Token::kString;
    next_.text = text_.substr(at_ + 1, end - at_ - 1);
    at_ = end + 1;
    return;
  }
  if (!in_word(c)) {
    next_.kind = Token::kSymbol;
    next_.text = c;
    ++at_;
    return;
  }
  size_t end = at_;
  while (end < text_.size()) {
    if (in_word(text_[end])) {
      ++end;
    } else if (text_.compare(end, 2, "::") == 0 && end + 2 < text_.size() && in_word(text_[end + 2])) {
      end += 2;  // .shared::cta; a single colon ends a label
    } else {
      break;
    }
  }
  next_.kind = Token::kWord;
  next_.text = text_.substr(at_, end - at_);
  at_ = end;
}

void Lexer::expect(const char* text) {
  if (!take_if(text))
    fail(std::string("expected '") + text + "', got " +
         (next_.kind == Token::kEnd ? "the end of the text" : "'" + next_.text + "'"));
}

std::string Lexer::rest_of_line(const Token& after) {
  if (next_.kind == Token::kEnd || next_.line != after.line) return "";
  size_t end = text_.find('\n', next_at_);
  if (end == std::string::npos) end = text_.size();
  std::string rest = text_.substr(next_at_, end - next_at_);
  if (const size_t comment = rest.find("//"); comment != std::string::npos && rest.find('"') == std::string::npos)
    rest.resize(comment);
  at_ = end;
  advance();
  return rest;
}

void Lexer::skip_braces() {
  for (int depth = 1; depth > 0;) {
    const Token token = take();
    if (token.kind == Token::kEnd) fail("expected '}', got the end of the text");
    depth += token.is("{") - token.is("}");
  }
}

}  // namespace ptx
