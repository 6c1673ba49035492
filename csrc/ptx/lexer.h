// Tokens of PTX text.
#pragma once

#include <string>

namespace ptx {

struct Token {
  enum Kind { kEnd, kWord, kSymbol, kString };
  Kind kind = kEnd;
  std::string text;
  int line = 0;
  bool is(const char* other) const {
    return kind != kString && text == other;
  }
};

class Lexer {
 public:
  Lexer(const std::string& text, const std::string& module) : text_(text), module_(module) {
    advance();
  }
  const Token& peek() const {
    return next_;
  }
  Token take() {
    Token token = next_;
    advance();
    return token;
  }
  bool take_if(const char* text) {
    if (!next_.is(text)) return false;
    advance();
    return true;
  }
  void expect(const char* text);
  // The rest of the line that the last taken token is on; the next token is of a later line.
  std::string rest_of_line(const Token& after);
  // Leaves out everything up to the brace that closes the one just taken.
  void skip_braces();
  [[noreturn]] void fail(const std::string& what) const;

 private:
  void advance();
  void skip_blank();
  const std::string& text_;
  std::string module_;
  size_t at_ = 0, next_at_ = 0;
  int line_ = 1;
  Token next_;
};

}  // namespace ptx
