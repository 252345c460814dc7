// Causal attention of new tokens to those of their sequence that a cache holds: no torch.
//
// A token's result depends on its own sequence alone: not on how many tokens are computed with it,
// nor on which of them were there before. What a later query of the same product sees and an
// earlier one does not gets a weight of 0 there, which adds nothing.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/cached_attention/arguments.h"

namespace convai_fast::cached_attention::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;

constexpr int64_t kRowsAhead = 4;

// One position's key to its column, of which the features are a row of the block apart.
CONVAI_FAST_INLINE void store_key(const float* key, int64_t padded_dim, float* column) {
  for (int64_t d = 0; d < padded_dim; ++d) column[d * kBlock] = key[d];
}

CONVAI_FAST_INLINE void store_key(const simd::BFloat16* key, int64_t padded_dim,
                                  simd::BFloat16* column) {
  for (int64_t d = 0; d < padded_dim; d += 2) {
    std::memcpy(column + d * kBlock, key + d, 2 * sizeof(simd::BFloat16));
  }
}

// 64 values of a position to their row of a block; of bfloat16 to one half of the words of a pair
// of positions. The first half clears the second, which is multiplied too, by 0, if it is the last.
CONVAI_FAST_INLINE void store_values(const float* value, int64_t, float* row) {
  std::copy_n(value, kBlock, row);
}

CONVAI_FAST_INLINE void store_values(const simd::BFloat16* value, int64_t half,
                                     simd::BFloat16* row) {
  for (int64_t n = 0; n < kBlock; ++n) {
    uint32_t word;
    std::memcpy(&word, row + 2 * n, sizeof(word));
    word = half == 0 ? value[n].bits : (word & 0xffff) | uint32_t{value[n].bits} << 16;
    std::memcpy(row + 2 * n, &word, sizeof(word));
  }
}

// Starts to read a row that is needed soon: rows of q, k and v are far from each other.
CONVAI_FAST_INLINE void fetch(const float* row, int64_t count) {
  constexpr int64_t kLine = 16;
  for (int64_t d = 0; d < count; d += kLine) __builtin_prefetch(row + d);
}

template <typename Kept>
CONVAI_FAST_INLINE void store_keys_and_values(const Arguments<Kept>& a, const Run& run,
                                              int64_t head, Kept* keys, Kept* values,
                                              const Scratch<Kept>& scratch) {
  constexpr int64_t kTogether = Arguments<Kept>::kTogether;
  const int64_t padded_dim = a.padded_dim(), value_dim = a.value_blocks() * kBlock;
  Kept* rounded = scratch.rounded;
  std::fill(rounded + a.head_dim(), rounded + value_dim, Kept{});
  for (int64_t row = run.first; row < run.end; ++row) {
    const int64_t position = run.length + row - run.first, half = position % kTogether;
    if (row + kRowsAhead < run.end) {
      fetch(a.k.at(row + kRowsAhead, head), a.head_dim());
      fetch(a.v.at(row + kRowsAhead, head), a.head_dim());
    }
    round_to(a.k.at(row, head), a.head_dim(), rounded);
    store_key(rounded, padded_dim,
              keys + position / kBlock * padded_dim * kBlock + position % kBlock * kTogether);
    round_to(a.v.at(row, head), a.head_dim(), rounded);
    for (int64_t block = 0; block < a.value_blocks(); ++block) {
      store_values(rounded + block * kBlock, half,
                   values + (block * a.capacity + position - half) * kBlock);
    }
  }
}

// Attention of the `count` tokens from `row` on, the first at `position`, to rows `to` and
// following of the results.
template <typename Kept>
CONVAI_FAST_INLINE void attend(const Arguments<Kept>& a, int64_t head, int64_t row, int64_t count,
                               int64_t position, int64_t to, const Kept* keys, const Kept* values,
                               const Scratch<Kept>& scratch) {
  const int64_t head_dim = a.head_dim(), padded_dim = a.padded_dim();
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  for (int64_t i = 0; i < count; ++i) {
    const float* query = a.q.at(row + i, head);
    for (int64_t d = 0; d < head_dim; ++d) scratch.scores[d] = query[d] * scale;
    scratch.queries[(i + 1) * padded_dim - 1] = {};
    round_to(scratch.scores, head_dim, scratch.queries + i * padded_dim);
  }

  const int64_t num_keys = position + count;
  for (int64_t first = 0; first < num_keys; first += kBlock) {
    block_product(scratch.queries, padded_dim, count, keys + first * padded_dim,
                  std::min(kBlock, num_keys - first), padded_dim, scratch.scores + first,
                  a.capacity);
  }

  const int64_t padded_keys = simd::round_up(num_keys, kWidth);
  float inverse_sums[kMostQueries];
  for (int64_t i = 0; i < count; ++i) {
    float* scores = scratch.scores + i * a.capacity;
    const int64_t seen = position + i + 1;
    const int64_t padded = simd::round_up(seen, kWidth);
    std::fill(scores + seen, scores + padded, -std::numeric_limits<float>::infinity());
    inverse_sums[i] = 1.0f / exponentiate(scores, padded).sum;
    std::fill(scores + padded, scores + padded_keys, 0.0f);
    round_to(scores, padded_keys, scratch.weights + i * a.capacity);
  }

  float sums[kMostQueries * kBlock];
  for (int64_t block = 0; block < a.value_blocks(); ++block) {
    block_product(scratch.weights, a.capacity, count, values + block * a.capacity * kBlock,
                  std::min(kBlock, head_dim - block * kBlock),
                  simd::round_up(num_keys, Arguments<Kept>::kTogether), sums, kBlock);
    const int64_t first = block * kBlock, valid = std::min(kBlock, head_dim - first);
    for (int64_t i = 0; i < count; ++i) {
      float* out = a.out.at(to + i, head) + first;
      for (int64_t n = 0; n < valid; ++n) out[n] = sums[i * kBlock + n] * inverse_sums[i];
    }
  }
}

template <typename Kept>
CONVAI_FAST_TARGET void cached_attention_kernel(const Arguments<Kept>& a, const Run& run,
                                                int64_t kv_head, const Scratch<Kept>& scratch) {
  const int64_t slot_head = run.slot * a.num_kv_heads + kv_head;
  Kept* keys = a.keys + slot_head * a.keys_size();
  Kept* values = a.values + slot_head * a.values_size();
  store_keys_and_values(a, run, kv_head, keys, values, scratch);
  for (int64_t head = kv_head * a.group; head < (kv_head + 1) * a.group; ++head) {
    for (int64_t row = run.query; row < run.end; row += kMostQueries) {
      attend(a, head, row, std::min(kMostQueries, run.end - row), run.length + row - run.first,
             run.out + row - run.query, keys, values, scratch);
    }
  }
}

}  // namespace convai_fast::cached_attention::CONVAI_FAST_ISA
