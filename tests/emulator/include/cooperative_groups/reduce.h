#pragma once

#include "cooperative_groups.h"

namespace cooperative_groups {

template <int kSize, typename T, typename F>
T reduce(const thread_block_tile<kSize>& tile, T x, F f) {
  return tile.fold(x, f, kSize - 1);
}

}  // namespace cooperative_groups
