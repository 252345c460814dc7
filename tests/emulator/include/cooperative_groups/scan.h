#pragma once

#include "cooperative_groups.h"

namespace cooperative_groups {

template <int kSize, typename T, typename F>
T inclusive_scan(const thread_block_tile<kSize>& tile, T x, F f) {
  return tile.fold(x, f, tile.thread_rank());
}

}  // namespace cooperative_groups
