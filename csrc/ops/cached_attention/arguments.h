// What the kernel of `cached_attention` is given, and how keys and values lie in the cache.
//
// Each sequence has a slot, and in it every head a matrix of keys, a position a column, and one of
// values, a dimension a column; both packed in blocks of 64 columns (simd/packed.h):
//
//   keys    [capacity / 64, head_dim / together, 64, together]
//   values  [value_blocks, capacity / together, 64, together]
//
// with together 1 of float32 and 2 of bfloat16. So scores are the product of queries and keys, and
// results that of weights and values, each by one block after another.
#pragma once

#include "ops/heads.h"
#include "simd/packed.h"

namespace convai_fast::cached_attention {

using simd::kBlock;

// Keys and values are kept as float or, at half the traffic and multiplied so, as simd::BFloat16.
template <typename Kept>
struct Arguments {
  Heads<const float> q, k, v;
  Kept* keys;    // [slots, num_kv_heads, ...]
  Kept* values;  // [slots, num_kv_heads, ...]
  Heads<float> out;
  int64_t num_kv_heads, group, capacity;  // `group` heads of queries share one of keys

  static constexpr int64_t kTogether = simd::Format<Kept>::kTogether;

  int64_t head_dim() const { return q.head_dim; }
  int64_t padded_dim() const { return simd::round_up(head_dim(), kTogether); }
  int64_t value_blocks() const { return simd::round_up(head_dim(), kBlock) / kBlock; }
  // In elements, of a head.
  int64_t keys_size() const { return capacity * padded_dim(); }
  int64_t values_size() const { return value_blocks() * capacity * kBlock; }

  Kept* keys_of(int64_t slot, int64_t head) const {
    return keys + (slot * num_kv_heads + head) * keys_size();
  }
  Kept* values_of(int64_t slot, int64_t head) const {
    return values + (slot * num_kv_heads + head) * values_size();
  }
};

// New tokens of one sequence: rows [first, end), which follow `length` tokens in `slot`. Those from
// row `query` on attend; their results go to rows `out` and following.
struct Run {
  int64_t slot, first, end, length, query, out;
};

constexpr int64_t kMostQueries = 12;  // of a group of heads that are multiplied together

// What a thread needs for them.
template <typename Kept>
struct Scratch {
  using Activation = typename simd::Format<Kept>::Activation;
  Kept* rounded;        // [value_blocks * 64]
  Activation* queries;  // [kMostQueries, padded_dim]
  float* scores;        // [kMostQueries, capacity], and no less than a head's width
  Activation* weights;  // [kMostQueries, capacity]
};

}  // namespace convai_fast::cached_attention
