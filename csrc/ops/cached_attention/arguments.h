// What the kernel of `cached_attention` is given.
#pragma once

#include "ops/heads.h"
#include "simd/vector_types.h"

namespace convai_fast::cached_attention {

using simd::kPanel;

constexpr int64_t kCapacityMultiple = 64;  // four panels of keys are read at once

// Keys and values are kept as float or, at half the traffic, as simd::BFloat16.
template <typename Kept>
struct Arguments {
  Heads<const float> q, k, v;
  Kept* keys;    // [slots, num_kv_heads, capacity / 16, head_dim, 16]
  Kept* values;  // [slots, num_kv_heads, capacity, value_dim]
  Heads<float> out;
  int64_t num_kv_heads, group, value_dim, capacity;  // `group` heads of queries share one of keys

  int64_t head_dim() const { return q.head_dim; }
};

// New tokens of one sequence: rows [first, end), which follow `length` tokens in `slot`.
struct Run {
  int64_t slot, first, end, length;
};

// In floats.
template <typename Kept>
int64_t scratch_size(const Arguments<Kept>& a) {
  return 4 * (a.capacity + a.head_dim());
}

}  // namespace convai_fast::cached_attention
