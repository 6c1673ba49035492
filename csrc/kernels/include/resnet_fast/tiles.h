// Tiles of an output, over which blocks walk.
#pragma once

#include <resnet_fast/device.h>

namespace resnet_fast {

struct Tile {
  int n, h, w;  // image, and first row and column of the output
};

// Tile `index` of a problem with tiles of kHeight x kWidth pixels, counted along W, then H, then N.
template <int kHeight, int kWidth, typename Params>
RF_DEVICE Tile tile_of(const Params& p, int index) {
  const int across = p.tiles_w(), per_image = across * p.tiles_h();
  const int rest = index % per_image;
  return {index / per_image, rest / across * kHeight, rest % across * kWidth};
}

}  // namespace resnet_fast
