// The words of an opcode, and the source that an instruction comes from.

#include <algorithm>

#include "instruction.h"

namespace ptx {

std::string Program::source(const Instruction& i) const {
  if (i.source < 0 || i.source >= static_cast<int32_t>(text->sources.size())) return "";
  const Source& s = text->sources[i.source];
  const auto name = [&](int file, int line) {
    const auto found = text->files.find(file);
    const std::string path = found == text->files.end() ? "file " + std::to_string(file) : found->second;
    return path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(line);
  };
  std::string out = name(s.file, s.line);
  if (s.inlined_file != 0) out += ", inlined at " + name(s.inlined_file, s.inlined_line);
  return out;
}

Modifiers::Modifiers(const std::string& opcode) {
  size_t from = 0;
  for (size_t dot; (dot = opcode.find('.', from)) != std::string::npos; from = dot + 1)
    words_.push_back(opcode.substr(from, dot - from));
  words_.push_back(opcode.substr(from));
}

bool Modifiers::take(const char* word) {
  for (size_t i = 1; i < words_.size(); ++i) {
    if (words_[i] == word) {
      words_[i].clear();
      return true;
    }
  }
  return false;
}

const char* Modifiers::take_one(std::initializer_list<const char*> words) {
  for (const char* word : words)
    if (take(word)) return word;
  return "";
}

Type Modifiers::take_type() {
  for (size_t i = 1; i < words_.size(); ++i) {
    const Type type = type_named(words_[i]);
    if (type == Type::kNone) continue;
    words_[i].clear();
    return type;
  }
  return Type::kNone;
}

bool Modifiers::empty() const {
  return std::all_of(words_.begin() + 1, words_.end(), [](const std::string& word) { return word.empty(); });
}

}  // namespace ptx
