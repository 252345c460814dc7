// The products of `packed_linear` in float32, and what becomes of a tile's sums.
#include "ops/packed_linear/arguments.h"

namespace convai_fast::packed_linear::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;

CONVAI_FAST_INLINE const float* copy_to(float* target, const float* source, int64_t count) {
  return std::copy_n(source, count, target) - count;
}

// Bias and activation, then to `out`, of which the last panel may reach beyond the row.
template <int kRows, int kPanels>
CONVAI_FAST_INLINE void finish(Tile<kRows, kPanels>& tile, const Arguments& a, int64_t row,
                               int64_t panel) {
  constexpr int64_t kColumns = kPanels * kPanel;
  const int64_t first = panel * kPanel, valid = std::min(kColumns, a.out_features - first);
  float edge[kColumns] = {};
  const float* bias = edge;
  if (a.bias != nullptr)
    bias = valid == kColumns ? a.bias + first : copy_to(edge, a.bias + first, valid);
#pragma GCC unroll 16
  for (int v = 0; v < tile.kColumns; ++v) {
    const auto b = Simd::load(bias + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      tile.sums[i][v] += b;
      if (a.gelu) tile.sums[i][v] = Simd::gelu(tile.sums[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    float* out = a.out + (row + i) * a.out_features + first;
    if (valid == kColumns) {
      tile.store_row(i, out);
    } else {
      tile.store_row(i, edge);
      std::copy_n(edge, valid, out);
    }
  }
}

// Products of `kRows` rows of x and `kPanels` panels, over input features [begin, end), added to
// what `out` holds unless this is the beginning.
template <int kRows, int kPanels, typename Weight>
CONVAI_FAST_INLINE void multiply_tile(const Arguments& a, int64_t row, int64_t panel, int64_t begin,
                                      int64_t end) {
  constexpr int64_t kColumns = kPanels * kPanel;
  const float* x = static_cast<const float*>(a.x) + row * a.in_features;
  const Weight* weight = static_cast<const Weight*>(a.weight) + panel * a.in_features * kPanel;
  float* out = a.out + row * a.out_features + panel * kPanel;
  const int64_t valid = std::min(kColumns, a.out_features - panel * kPanel);
  float edge[kColumns] = {};

  Tile<kRows, kPanels> tile;
  tile.clear();
  if (begin > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const float* so_far = out + i * a.out_features;
      tile.load_row(i, valid == kColumns ? so_far : copy_to(edge, so_far, valid));
    }
  }
  tile.add_products(x, a.in_features, weight, kPanel, a.in_features * kPanel, begin, end);
  if (end == a.in_features) return finish(tile, a, row, panel);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    tile.store_row(i, valid == kColumns ? out + i * a.out_features : edge);
    if (valid < kColumns) std::copy_n(edge, valid, out + i * a.out_features);
  }
}

}  // namespace convai_fast::packed_linear::CONVAI_FAST_ISA
