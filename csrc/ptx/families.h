// The families of opcodes, and which file understands them. families.cpp has the table.
#pragma once

#include "instruction.h"

namespace ptx {

// The function of CUDA's runtime that assertions call when they fail. It is executed as an instruction.
inline const std::string kAssertion = "__assertfail";

// integer.cpp
Form decode_integer(Modifiers& m);
// bits.cpp: logic, shifts, bit fields, permutations
Form decode_bits(Modifiers& m);
// floating.cpp
Form decode_floating(Modifiers& m);
// compare.cpp: setp, set, selp, slct, min, max
Form decode_compare(Modifiers& m);
// convert.cpp: cvt
Form decode_convert(Modifiers& m);
// float8.cpp: cvt of pairs of 8-bit numbers
Form decode_float8(Modifiers& m);
// move.cpp: mov, cvta, isspacep
Form decode_move(Modifiers& m);
// access.cpp: ld, st, prefetch
Form decode_access(Modifiers& m);
// atomic.cpp: atom, red
Form decode_atomic(Modifiers& m);
// branches.cpp: bra, brx, ret, exit, trap, a failed assertion
Form decode_branch(Modifiers& m);
// lanes.cpp: shfl, vote, match, redux, elect, activemask
Form decode_lanes(Modifiers& m);
// barriers.cpp: bar, barrier, membar, fence
Form decode_barrier(Modifiers& m);

// matrix.cpp: ldmatrix, stmatrix; mma
Form decode_ldmatrix(Modifiers& m);
Form decode_mma(Modifiers& m);
// wgmma.cpp
Form decode_wgmma(Modifiers& m);
// copies.cpp: cp
Form decode_cp(Modifiers& m);
// mbarrier.cpp: mbarrier; the fences between proxies
Form decode_mbarrier(Modifiers& m);
Form decode_proxy_fence(Modifiers& m);

}  // namespace ptx
