// What the kernel of `cached_attention` is given.
#pragma once

#include "simd/vector_types.h"

namespace convai_fast::cached_attention {

using simd::kPanel;

constexpr int64_t kCapacityMultiple = 64;  // four panels of keys are read at once

// Keys and values are kept as float or, at half the traffic, as simd::BFloat16.
template <typename Kept>
struct Arguments {
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

// In floats.
template <typename Kept>
int64_t scratch_size(const Arguments<Kept>& a) {
  return 4 * (a.capacity + a.head_dim);
}

}  // namespace convai_fast::cached_attention
