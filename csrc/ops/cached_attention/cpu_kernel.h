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

// Keys or values that are multiplied soon: `features` of a block, or of blocks one after another.
template <typename Kept>
CONVAI_FAST_INLINE Ahead rows_ahead(const Kept* first, int64_t features) {
  constexpr int64_t kTogether = Arguments<Kept>::kTogether;
  return {reinterpret_cast<const int32_t*>(first), simd::round_up(features, kTogether) / kTogether};
}

CONVAI_FAST_INLINE void fetch(Ahead ahead, int64_t columns) {
  for (int64_t row = 0; row < ahead.rows; ++row) ahead.fetch(row, columns);
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

// A token's query of one of the heads that share keys: with two heads to a group, queries 0 and 1
// are those of the first token, 2 and 3 those of the second.
struct Query {
  int64_t token, head;
};

template <typename Kept>
CONVAI_FAST_INLINE Query query_of(const Arguments<Kept>& a, int64_t kv_head, int64_t i) {
  return {i / a.group, kv_head * a.group + i % a.group};
}

// Attention of the `count` queries of a group of heads from `first` on, of tokens from `run.query`
// on. With `next`, those of a single token, which wait for memory: while its keys are
// multiplied, its values are fetched, and meanwhile as many of the keys there, which are multiplied
// next. What stands beside a block that is not whole, at once.
template <typename Kept>
CONVAI_FAST_INLINE void attend(const Arguments<Kept>& a, const Run& run, int64_t kv_head,
                               int64_t first_query, int64_t count, const Kept* keys,
                               const Kept* values, const Kept* next, const Scratch<Kept>& scratch) {
  constexpr int64_t kTogether = Arguments<Kept>::kTogether;
  const int64_t head_dim = a.head_dim(), padded_dim = a.padded_dim();
  const auto keys_seen_by = [&](int64_t token) CONVAI_FAST_INLINE_LAMBDA {
    return run.length + run.query - run.first + token + 1;
  };
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  for (int64_t i = 0; i < count; ++i) {
    const auto [token, head] = query_of(a, kv_head, first_query + i);
    const float* query = a.q.at(run.query + token, head);
    for (int64_t d = 0; d < head_dim; ++d) scratch.scores[d] = query[d] * scale;
    scratch.queries[(i + 1) * padded_dim - 1] = {};
    round_to(scratch.scores, head_dim, scratch.queries + i * padded_dim);
  }

  const int64_t num_keys = keys_seen_by(query_of(a, kv_head, first_query + count - 1).token);
  for (int64_t first = 0; first < num_keys; first += kBlock) {
    const int64_t columns = std::min(kBlock, num_keys - first);
    const Ahead ahead = next ? rows_ahead(values + first * kBlock, columns) : Ahead{};
    if (columns < kBlock) fetch(ahead, kBlock);
    block_product(scratch.queries, padded_dim, count, keys + first * padded_dim, columns,
                  padded_dim, scratch.scores + first, a.capacity, ahead);
  }

  const int64_t padded_keys = simd::round_up(num_keys, kWidth);
  float inverse_sums[kMostQueries];
  for (int64_t i = 0; i < count; ++i) {
    float* scores = scratch.scores + i * a.capacity;
    const int64_t seen = keys_seen_by(query_of(a, kv_head, first_query + i).token);
    const int64_t padded = simd::round_up(seen, kWidth);
    std::fill(scores + seen, scores + padded, -std::numeric_limits<float>::infinity());
    inverse_sums[i] = 1.0f / exponentiate(scores, padded).sum;
    std::fill(scores + padded, scores + padded_keys, 0.0f);
    round_to(scores, padded_keys, scratch.weights + i * a.capacity);
  }

  const int64_t whole = num_keys / kBlock * kBlock, summed = simd::round_up(num_keys, kTogether);
  Ahead ahead;
  if (next) {
    ahead = rows_ahead(next, whole * padded_dim / kBlock);
    fetch(rows_ahead(next + whole * padded_dim, padded_dim), num_keys - whole);
  }
  float sums[kMostQueries * kBlock];
  for (int64_t block = 0; block < a.value_blocks(); ++block) {
    block_product(scratch.weights, a.capacity, count, values + block * a.capacity * kBlock,
                  std::min(kBlock, head_dim - block * kBlock), summed, sums, kBlock,
                  ahead.part(block * summed / kTogether, summed / kTogether));
    const int64_t first = block * kBlock, valid = std::min(kBlock, head_dim - first);
    for (int64_t i = 0; i < count; ++i) {
      const auto [token, head] = query_of(a, kv_head, first_query + i);
      float* out = a.out.at(run.out + token, head) + first;
      for (int64_t n = 0; n < valid; ++n) out[n] = sums[i * kBlock + n] * inverse_sums[i];
    }
  }
}

// New tokens of `run` in a head of keys; `next` are the keys that this thread is given next.
template <typename Kept>
CONVAI_FAST_TARGET void cached_attention_kernel(const Arguments<Kept>& a, const Run& run,
                                                int64_t kv_head, const Kept* next,
                                                const Scratch<Kept>& scratch) {
  Kept* keys = a.keys_of(run.slot, kv_head);
  Kept* values = a.values_of(run.slot, kv_head);
  store_keys_and_values(a, run, kv_head, keys, values, scratch);
  if (run.end - run.query > 1) next = nullptr;  // multiplied for longer than it is read
  const int64_t queries = (run.end - run.query) * a.group;
  for (int64_t first = 0; first < queries; first += kMostQueries) {
    const int64_t following = std::min(first + 2 * kMostQueries, queries);
    for (int64_t i = first + kMostQueries; i < following; ++i) {
      const auto [token, head] = query_of(a, kv_head, i);
      fetch(a.q.at(run.query + token, head), a.head_dim());
    }
    attend(a, run, kv_head, first, std::min(kMostQueries, queries - first), keys, values, next,
           scratch);
    next = nullptr;  // it has been fetched
  }
}

}  // namespace convai_fast::cached_attention::CONVAI_FAST_ISA
