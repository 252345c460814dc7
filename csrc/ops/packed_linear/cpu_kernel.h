// out = x W^T + bias for float32 x and packed W: no torch, raw pointers.
//
// W [out_features, in_features] is packed in panels of 16 output features, with those 16 weights of
// one input feature side by side: [out_features / 16, in_features, 16], the last panel padded. An
// element of `out` is always summed in the same order, one input feature after another, whatever
// the number of rows: so a row's result does not depend on the rows beside it.
//
// int8 weights have pairs of input features innermost, [.., in_features / 2, 16, 2], and a scale
// for each output feature. A row of x is rounded to int16 with a scale of its own, as fine as int32
// sums allow, and multiplied in integers.
#include <type_traits>

#include "ops/packed_linear/int8.h"

namespace convai_fast::packed_linear::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;

constexpr int64_t kMostFeatures = 1024;     // that are multiplied before the next panel
constexpr int64_t kChunkBytes = 256 << 10;  // of x, to stay in the second-level cache

// The rows of a tile: as many as the registers hold accumulators for, beside weights and x.
constexpr int kTileRows = kWidth == 16 ? 12 : kWidth == 8 ? 6 : 3;

template <int kRows, int kPanels, typename Weight>
CONVAI_FAST_INLINE void tile_of(const Arguments& a, int64_t row, int64_t panel, int64_t begin,
                                int64_t end) {
  if constexpr (std::is_same_v<Weight, int8_t>) {
    multiply_int8_tile<kRows, kPanels>(a, row, panel);
  } else {
    multiply_tile<kRows, kPanels, Weight>(a, row, panel, begin, end);
  }
}

// The rows [row, end_row), fewer than kTileRows + 1, by panels [panel, end_panel): one tile with
// exactly so many rows. Few rows take several panels at once, since one panel alone has too few
// sums to keep the multipliers busy.
template <int kRows, typename Weight>
CONVAI_FAST_INLINE void rows_by_panels(const Arguments& a, int64_t row, int64_t num_rows,
                                       int64_t panel, int64_t end_panel, int64_t begin,
                                       int64_t end) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows) {
      return rows_by_panels<kRows - 1, Weight>(a, row, num_rows, panel, end_panel, begin, end);
    }
  }
  constexpr int kTogether = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;
  for (; panel + kTogether <= end_panel; panel += kTogether) {
    tile_of<kRows, kTogether, Weight>(a, row, panel, begin, end);
  }
  for (; panel < end_panel; ++panel) tile_of<kRows, 1, Weight>(a, row, panel, begin, end);
}

// All rows by panels [first_panel, end_panel).
template <typename Weight>
CONVAI_FAST_TARGET void packed_linear_kernel(const Arguments& a, int64_t first_panel,
                                             int64_t end_panel) {
  constexpr bool kInt8 = std::is_same_v<Weight, int8_t>;
  // Integer products need a register more than float ones, which are added as they are made.
  constexpr int kRows = kTileRows - (kInt8 ? 1 : 0);
  const int64_t block = kInt8 ? a.in_features : std::min(a.in_features, kMostFeatures);
  const int64_t row_bytes = std::max<int64_t>(1, block * (kInt8 ? 2 : 4));
  const int64_t chunk = std::max<int64_t>(1, kChunkBytes / row_bytes / kRows) * kRows;
  for (int64_t first_row = 0; first_row < a.rows; first_row += chunk) {
    const int64_t end_row = std::min(a.rows, first_row + chunk);
    int64_t begin = 0;
    do {
      const int64_t end = std::min(a.in_features, begin + block);
      // One panel for all rows of the chunk, then the next; but with one tile of rows only, all
      // panels at once.
      const int64_t step = end_row - first_row <= kRows ? end_panel - first_panel : 1;
      for (int64_t panel = first_panel; panel < end_panel; panel += step) {
        for (int64_t row = first_row; row < end_row; row += kRows) {
          rows_by_panels<kRows, Weight>(a, row, std::min<int64_t>(kRows, end_row - row), panel,
                                        panel + step, begin, end);
        }
      }
      begin = end;
    } while (begin < a.in_features);
  }
}

}  // namespace convai_fast::packed_linear::CONVAI_FAST_ISA
