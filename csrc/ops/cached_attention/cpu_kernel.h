// Causal attention of new tokens to those of their sequence that a cache holds: no torch.
//
// Each sequence has a slot of the cache, for every head
//   keys    [capacity / 16, head_dim, 16]: 16 positions side by side, as panels of a product
//   values  [capacity, padded head_dim]
// and both products are those of tile.h, so that a token's result depends on its own sequence
// alone: not on how many tokens are computed with it, nor on which of them were there before.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "simd/isa.h"
#include "simd/tile.h"

namespace convai_fast {

constexpr int64_t kCapacityMultiple = 64;  // four panels of keys are read at once

// Keys and values are kept as float or, at half the traffic, as BFloat16.
template <typename Kept>
struct AttentionArguments {
  const float* qkv;  // [tokens, 3, num_heads, head_dim]
  Kept* keys;        // [slots, num_heads, capacity / 16, head_dim, 16]
  Kept* values;      // [slots, num_heads, capacity, value_dim]
  float* out;        // [tokens, num_heads, head_dim]
  int64_t num_heads, head_dim, value_dim, capacity;
};

// New tokens of one sequence: rows [first, end) of qkv, which follow `length` tokens in `slot`.
struct Run {
  int64_t slot, first, end, length;
};

inline void keep(float x, float* target) { *target = x; }
inline void keep(float x, BFloat16* target) { *target = to_bfloat16(x); }

template <typename Kept>
void store_keys_and_values(const AttentionArguments<Kept>& a, const Run& run, int64_t head,
                           Kept* keys, Kept* values) {
  const int64_t width = a.num_heads * a.head_dim;
  for (int64_t row = run.first; row < run.end; ++row) {
    const int64_t position = run.length + row - run.first;
    const float* key = a.qkv + row * 3 * width + width + head * a.head_dim;
    const float* value = key + width;
    Kept* column = keys + position / kPanel * a.head_dim * kPanel + position % kPanel;
    for (int64_t d = 0; d < a.head_dim; ++d) {
      keep(key[d], column + d * kPanel);
      keep(value[d], values + position * a.value_dim + d);
    }
  }
}

// Attention of `kRows` tokens one after another, the first at `position` and in `row` of qkv.
// `scratch` holds kRows * (capacity + head_dim) floats.
template <int kWidth, int kRows, typename Kept>
CONVAI_FAST_INLINE void attend(const AttentionArguments<Kept>& a, int64_t head, int64_t row,
                               int64_t position, const Kept* keys, const Kept* values,
                               float* scratch) {
  using S = Simd<kWidth>;
  constexpr int kPanels = kRows == 1 ? 4 : 1;
  const int64_t width = a.num_heads * a.head_dim;
  float* queries = scratch;
  float* scores = scratch + kRows * a.head_dim;
  const float scale = 1.0f / std::sqrt(static_cast<float>(a.head_dim));
  for (int i = 0; i < kRows; ++i) {
    const float* query = a.qkv + (row + i) * 3 * width + head * a.head_dim;
    for (int64_t d = 0; d < a.head_dim; ++d) queries[i * a.head_dim + d] = query[d] * scale;
  }

  const int64_t num_keys = position + kRows;
  for (int64_t first = 0; first < num_keys; first += kPanels * kPanel) {
    Tile<kWidth, kRows, kPanels> tile;
    tile.clear();
    tile.add_products(queries, a.head_dim, keys + first * a.head_dim, kPanel, a.head_dim * kPanel,
                      0, a.head_dim);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) tile.store_row(i, scores + i * a.capacity + first);
  }

  float inverse_sums[kRows];
  for (int i = 0; i < kRows; ++i) {
    float* row_scores = scores + i * a.capacity;
    const int64_t seen = position + i + 1;
    const int64_t padded = (seen + kPanel - 1) / kPanel * kPanel;
    std::fill(row_scores + seen, row_scores + padded, -std::numeric_limits<float>::infinity());
    auto largest = S::load(row_scores);
    for (int64_t j = kWidth; j < padded; j += kWidth) {
      largest = S::max(largest, S::load(row_scores + j));
    }
    const float row_largest = S::max(largest);
    typename S::Float sum{};
    for (int64_t j = 0; j < padded; j += kWidth) {
      const auto weight = S::exp(S::load(row_scores + j) - row_largest);
      S::store(row_scores + j, weight);
      sum += weight;
    }
    inverse_sums[i] = 1.0f / S::sum(sum);
    // A later row of the tile sees keys that this one does not.
    std::fill(row_scores + padded, row_scores + std::max(padded, num_keys), 0.0f);
  }

  float columns[kPanels * kPanel];
  for (int64_t d = 0; d < a.head_dim; d += kPanels * kPanel) {
    Tile<kWidth, kRows, kPanels> tile;
    tile.clear();
    tile.add_products(scores, a.capacity, values + d, a.value_dim, kPanel, 0, num_keys);
    const int64_t valid = std::min(kPanels * kPanel, a.head_dim - d);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      tile.store_row(i, columns);
      float* out = a.out + (row + i) * width + head * a.head_dim + d;
      for (int64_t n = 0; n < valid; ++n) out[n] = columns[n] * inverse_sums[i];
    }
  }
}

template <int kWidth, typename Kept>
CONVAI_FAST_INLINE void attention_body(const AttentionArguments<Kept>& a, const Run& run,
                                       int64_t head, float* scratch) {
  const int64_t slot_head = run.slot * a.num_heads + head;
  Kept* keys = a.keys + slot_head * a.capacity * a.head_dim;
  Kept* values = a.values + slot_head * a.capacity * a.value_dim;
  store_keys_and_values(a, run, head, keys, values);
  int64_t row = run.first;
  for (; row + 4 <= run.end; row += 4) {
    attend<kWidth, 4>(a, head, row, run.length + row - run.first, keys, values, scratch);
  }
  for (; row < run.end; ++row) {
    attend<kWidth, 1>(a, head, row, run.length + row - run.first, keys, values, scratch);
  }
}

template <typename Kept>
int64_t attention_scratch(const AttentionArguments<Kept>& a) {
  return 4 * (a.capacity + a.head_dim);
}

#if CONVAI_FAST_X86
template <typename Kept>
CONVAI_FAST_AVX512 void attention_avx512(const AttentionArguments<Kept>& a, const Run& run,
                                         int64_t head, float* scratch) {
  attention_body<16>(a, run, head, scratch);
}
template <typename Kept>
CONVAI_FAST_AVX2 void attention_avx2(const AttentionArguments<Kept>& a, const Run& run,
                                     int64_t head, float* scratch) {
  attention_body<8>(a, run, head, scratch);
}
#endif
template <typename Kept>
void attention_portable(const AttentionArguments<Kept>& a, const Run& run, int64_t head,
                        float* scratch) {
  attention_body<4>(a, run, head, scratch);
}

template <typename Kept>
using Attention = void (*)(const AttentionArguments<Kept>&, const Run&, int64_t head,
                           float* scratch);

template <typename Kept>
Attention<Kept> attention_for(Isa isa) {
#if CONVAI_FAST_X86
  if (isa == Isa::kAvx512) return attention_avx512<Kept>;
  if (isa == Isa::kAvx2) return attention_avx2<Kept>;
#endif
  return attention_portable<Kept>;
}

}  // namespace convai_fast
