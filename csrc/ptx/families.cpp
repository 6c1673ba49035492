// The table of families.

#include "families.h"

#include <unordered_map>

namespace ptx {

Family family_named(const std::string& word) {
  static const std::unordered_map<std::string, Family> kFamilies = [] {
    std::unordered_map<std::string, Family> all;
    const auto add = [&](Family family, std::initializer_list<const char*> words) {
      for (const char* name : words) all[name] = family;
    };
    // Of several meanings, by type: add.f32 is decode_floating's, which hands integers on.
    add(decode_floating, {"add", "sub",  "mul",   "mad", "fma", "div", "abs", "neg",  "min",      "max",
                          "rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2", "tanh", "copysign", "testp"});
    add(decode_integer, {"rem", "addc", "subc", "madc", "mul24", "mad24", "sad", "dp4a", "dp2a"});
    add(decode_bits, {"and", "or", "xor", "not", "cnot", "lop3", "shl", "shr", "shf", "bfe", "bfi", "bfind", "brev",
                      "clz", "popc", "prmt", "szext", "bmsk"});
    add(decode_compare, {"setp", "set", "selp", "slct"});
    add(decode_convert, {"cvt"});
    add(decode_move, {"mov", "cvta", "isspacep"});
    add(decode_access, {"ld", "ldu", "st", "prefetch", "prefetchu", "applypriority", "discard", "createpolicy"});
    add(decode_atomic, {"atom", "red"});
    add(decode_branch, {"bra", "brx", "ret", "exit", "trap", "brkpt", "nanosleep", "griddepcontrol"});
    all[kAssertion] = decode_branch;
    add(decode_lanes, {"shfl", "vote", "match", "redux", "elect", "activemask"});
    add(decode_barrier, {"bar", "barrier", "membar", "fence"});
    add(decode_ldmatrix, {"ldmatrix", "stmatrix"});
    add(decode_mma, {"mma"});
    add(decode_wgmma, {"wgmma"});
    add(decode_cp, {"cp"});
    add(decode_mbarrier, {"mbarrier"});
    return all;
  }();
  const auto found = kFamilies.find(word);
  return found == kFamilies.end() ? nullptr : found->second;
}

}  // namespace ptx
