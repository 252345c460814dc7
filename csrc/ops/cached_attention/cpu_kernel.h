// Causal attention of new tokens to those of their sequence that a cache holds: no torch.
//
// Each sequence has a slot of the cache, for every head
//   keys    [capacity / 16, head_dim, 16]: 16 positions side by side, as panels of a product
//   values  [capacity, padded head_dim]
// and both products are those of tile.h, so that a token's result depends on its own sequence
// alone: not on how many tokens are computed with it, nor on which of them were there before.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/cached_attention/arguments.h"

namespace convai_fast::cached_attention::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;

template <typename Kept>
CONVAI_FAST_INLINE void store_keys_and_values(const Arguments<Kept>& a, const Run& run,
                                              int64_t head, Kept* keys, Kept* values) {
  for (int64_t row = run.first; row < run.end; ++row) {
    const int64_t position = run.length + row - run.first;
    const float *key = a.k.at(row, head), *value = a.v.at(row, head);
    Kept* column = keys + position / kPanel * a.head_dim() * kPanel + position % kPanel;
    for (int64_t d = 0; d < a.head_dim(); ++d) {
      simd::store(key[d], column + d * kPanel);
      simd::store(value[d], values + position * a.value_dim + d);
    }
  }
}

// Attention of `kRows` tokens one after another, the first at `position` and in `row`.
// `scratch` holds kRows * (capacity + head_dim) floats.
template <int kRows, typename Kept>
CONVAI_FAST_INLINE void attend(const Arguments<Kept>& a, int64_t head, int64_t row,
                               int64_t position, const Kept* keys, const Kept* values,
                               float* scratch) {
  constexpr int kPanels = kRows == 1 ? 4 : 1;
  const int64_t head_dim = a.head_dim();
  float* queries = scratch;
  float* scores = scratch + kRows * head_dim;
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  for (int i = 0; i < kRows; ++i) {
    const float* query = a.q.at(row + i, head);
    for (int64_t d = 0; d < head_dim; ++d) queries[i * head_dim + d] = query[d] * scale;
  }

  const int64_t num_keys = position + kRows;
  for (int64_t first = 0; first < num_keys; first += kPanels * kPanel) {
    Tile<kRows, kPanels> tile;
    tile.clear();
    tile.add_products(queries, head_dim, keys + first * head_dim, kPanel, head_dim * kPanel, 0,
                      head_dim);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) tile.store_row(i, scores + i * a.capacity + first);
  }

  float inverse_sums[kRows];
  for (int i = 0; i < kRows; ++i) {
    float* row_scores = scores + i * a.capacity;
    const int64_t seen = position + i + 1;
    const int64_t padded = simd::round_up(seen, kPanel);
    std::fill(row_scores + seen, row_scores + padded, -std::numeric_limits<float>::infinity());
    inverse_sums[i] = 1.0f / exponentiate(row_scores, padded).sum;
    // A later row of the tile sees keys that this one does not.
    std::fill(row_scores + padded, row_scores + std::max(padded, num_keys), 0.0f);
  }

  float columns[kPanels * kPanel];
  for (int64_t d = 0; d < head_dim; d += kPanels * kPanel) {
    Tile<kRows, kPanels> tile;
    tile.clear();
    tile.add_products(scores, a.capacity, values + d, a.value_dim, kPanel, 0, num_keys);
    const int64_t valid = std::min(kPanels * kPanel, head_dim - d);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      tile.store_row(i, columns);
      float* out = a.out.at(row + i, head) + d;
      for (int64_t n = 0; n < valid; ++n) out[n] = columns[n] * inverse_sums[i];
    }
  }
}

template <typename Kept>
CONVAI_FAST_TARGET void cached_attention_kernel(const Arguments<Kept>& a, const Run& run,
                                                int64_t kv_head, float* scratch) {
  const int64_t slot_head = run.slot * a.num_kv_heads + kv_head;
  Kept* keys = a.keys + slot_head * a.capacity * a.head_dim();
  Kept* values = a.values + slot_head * a.capacity * a.value_dim;
  store_keys_and_values(a, run, kv_head, keys, values);
  for (int64_t head = kv_head * a.group; head < (kv_head + 1) * a.group; ++head) {
    int64_t row = run.first;
    for (; row + 4 <= run.end; row += 4) {
      attend<4>(a, head, row, run.length + row - run.first, keys, values, scratch);
    }
    for (; row < run.end; ++row) {
      attend<1>(a, head, row, run.length + row - run.first, keys, values, scratch);
    }
  }
}

}  // namespace convai_fast::cached_attention::CONVAI_FAST_ISA
