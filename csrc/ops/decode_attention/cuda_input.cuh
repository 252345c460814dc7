// What the kernel of `decode_attention` is given, and which of its variants fits that: no torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

#include "ops/part.cuh"

namespace convai_fast::decode_attention {

constexpr int kMaxWarps = 8;

// [rows, heads, head_dim], a head's features side by side.
template <typename Scalar>
struct Heads {
  Scalar* data;
  int64_t row_stride;
  int head_stride;

  __device__ Scalar* at(int64_t row, int head) const {
    return data + row * row_stride + static_cast<int64_t>(head) * head_stride;
  }
};

// [num_slots, capacity, num_kv_heads, head_dim], a head's features side by side.
template <typename Scalar>
struct Cache {
  Scalar* data;
  int64_t slot_stride;
  int position_stride, head_stride;

  // The first position of a slot's head; `offset` leads to others.
  __device__ Scalar* at(int64_t slot, int head) const {
    return data + slot * slot_stride + static_cast<int64_t>(head) * head_stride;
  }
  __device__ int64_t offset(int position) const {
    return static_cast<int64_t>(position) * position_stride;
  }
};

// One value a row.
struct PerRow {
  const int64_t* data;
  int64_t stride;

  __device__ int64_t operator[](int64_t row) const { return data[row * stride]; }
};

template <typename Scalar>
struct Input {
  Heads<const Scalar> q, k, v;
  Cache<Scalar> keys, values;
  PerRow slots, lengths;
  Heads<Scalar> out;
  int64_t num_slots, capacity;
  int num_kv_heads, group, head_dim;  // `group` heads of queries share one of keys
  int log_lanes;                      // 2 to this power lanes have a key together
  float scale;                        // of scores

  // Of a block: more read a long slot sooner, and have to come together for a short one.
  __host__ __device__ int num_warps() const { return capacity > 1024 ? kMaxWarps : kMaxWarps / 2; }
  // A query's partial result, as warps share it: its largest score, its sum and its features.
  __host__ __device__ int partial_size() const { return 2 + head_dim; }
};

inline int log_lanes_for(int64_t head_dim) {
  int log = 0;
  while (kPart << log < head_dim) ++log;
  return log;
}

// Of scores whose powers are those of 2, as a GPU has them.
inline float scale_for(int64_t head_dim) {
  return static_cast<float>(std::numbers::log2e / std::sqrt(static_cast<double>(head_dim)));
}

// What a launch takes: x rows and heads of keys, y parts of their groups.
struct Grid {
  unsigned x, y;
  int threads;
  int64_t shared_bytes;
};

template <typename Scalar>
Grid grid_of(const Input<Scalar>& in, int64_t rows, int queries) {
  return {.x = static_cast<unsigned>(rows * in.num_kv_heads),
          .y = static_cast<unsigned>((in.group + queries - 1) / queries),
          .threads = in.num_warps() * 32,
          .shared_bytes =
              static_cast<int64_t>(sizeof(float)) * in.num_warps() * queries * in.partial_size()};
}

// Calls `launch<kQueries, kAligned>()` with what fits the input.
template <typename Scalar, typename Launch>
void for_variant(const Input<Scalar>& in, const Launch& launch) {
  uintptr_t bits = in.head_dim % kPart;  // and of all places and distances of heads, in bytes
  const auto add = [&](const Scalar* data, auto... strides) {
    bits |= reinterpret_cast<uintptr_t>(data) | sizeof(Scalar) * (strides | ...);
  };
  add(in.q.data, in.q.row_stride, in.q.head_stride);
  add(in.k.data, in.k.row_stride, in.k.head_stride);
  add(in.v.data, in.v.row_stride, in.v.head_stride);
  add(in.keys.data, in.keys.slot_stride, in.keys.position_stride, in.keys.head_stride);
  add(in.values.data, in.values.slot_stride, in.values.position_stride, in.values.head_stride);
  if (bits % 16 != 0) {
    launch.template operator()<1, false>();
  } else if (in.group == 1) {
    launch.template operator()<1, true>();
  } else if (in.group == 2) {
    launch.template operator()<2, true>();
  } else if (in.group <= 4 || in.head_dim > 128) {  // which 8 would not fit the shared memory
    launch.template operator()<4, true>();
  } else {
    launch.template operator()<8, true>();
  }
}

}  // namespace convai_fast::decode_attention
