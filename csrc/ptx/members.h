// Masks of lanes, as the .sync instructions take them.
#pragma once

#include "warp.h"

namespace ptx {

// A finding unless the active lanes are those of the mask that have not left the kernel.
void require_members(Warp& w, const Instruction& i, const Slot& mask);

}  // namespace ptx
