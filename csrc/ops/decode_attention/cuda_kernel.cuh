// `decode_attention` on a GPU: no torch.
//
// A block has one head of a row's keys and values, and the queries that share it; its warps share
// out the positions. Several lanes have a key together and a warp several keys at a time, so that
// memory always has something to do: that keys and values are read once is what it takes. The new
// token's are read from where they were given, so that none has to wait until they are stored.
//
// Shapes say who has which position, and in which order partial results come together; the number
// of rows does not. So a row gives the same bits whatever the others are.
#pragma once

#include <cooperative_groups.h>

#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <type_traits>

namespace convai_fast::decode_attention {

namespace cg = cooperative_groups;

constexpr int kPart = 8;  // features of a head that a lane has
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

// Whether a type is the upper half of float32, as bfloat16 is.
template <typename Scalar>
inline constexpr bool kIsUpperHalf = false;

// What a lane has of a head: one load of 16 bytes, or two in float32. Words of 32 bits are what a
// register holds: 16-bit numbers by themselves would take twice as many.
template <typename Scalar>
struct alignas(16) Part {
  static constexpr int kInWord = 4 / sizeof(Scalar), kBits = 8 * sizeof(Scalar);
  using Bits = std::conditional_t<kInWord == 2, uint16_t, uint32_t>;
  uint32_t words[kPart / kInWord];

  __device__ void set(int i, Scalar x) {
    const uint32_t bits = std::bit_cast<Bits>(x);
    words[i / kInWord] |= bits << (i % kInWord * kBits);
  }
  __device__ float operator[](int i) const {
    const uint32_t word = words[i / kInWord];
    if constexpr (kIsUpperHalf<Scalar>) {
      return std::bit_cast<float>(i % 2 == 0 ? word << 16 : word & 0xFFFF0000u);
    } else {
      const auto bits = static_cast<Bits>(word >> (i % kInWord * kBits));
      return static_cast<float>(std::bit_cast<Scalar>(bits));
    }
  }
};

__device__ inline float power_of_2(float x) {
#ifdef __CUDA_ARCH__
  float power;  // to 2 units in the last place, and 0 for what is denormal
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return exp2f(x);
#endif
}

// What a query has made of some keys: their largest score, and relative to it the sum of their
// weights and of their values by weight.
struct Partial {
  float largest = -FLT_MAX, sum = 0;  // finite, so that no key at all makes no NaN
  float values[kPart] = {};

  __device__ void rescale(float to) {
    const float factor = power_of_2(largest - to);
    largest = to;
    sum *= factor;
    for (float& value : values) value *= factor;
  }
};

// What a block does; it has `kQueries` queries of a group, or those that are left. With kAligned
// all parts are whole and begin at multiples of 16 bytes.
template <typename Scalar, int kQueries, bool kAligned>
__device__ void decode_block(const Input<Scalar>& in, float* shared) {
  constexpr int kLoads = kQueries < 8 ? 4 : 2;  // of keys that a lane has under way, and of values
  const auto tile = cg::tiled_partition<32>(cg::this_thread_block());
  const int num_threads = in.num_warps() * 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int log_lanes = in.log_lanes, lanes = 1 << log_lanes;
  const unsigned row = blockIdx.x / static_cast<unsigned>(in.num_kv_heads);
  const int kv_head = blockIdx.x - row * in.num_kv_heads, first_query = blockIdx.y * kQueries;
  const int num_queries = min(in.group - first_query, kQueries);
  const int head = kv_head * in.group + first_query;
  const int64_t slot = in.slots[row], row_length = in.lengths[row];
  if (slot < 0 || slot >= in.num_slots || row_length < 0 || row_length >= in.capacity) {
    // An error would need the host to wait; this it finds in what becomes of the row.
#pragma unroll 1
    for (int i = threadIdx.x; i < num_queries * in.head_dim; i += num_threads) {
      in.out.at(row, head + i / in.head_dim)[i % in.head_dim] = static_cast<Scalar>(NAN);
    }
    return;
  }
  const int length = row_length;
  const Scalar* const new_key = in.k.at(row, kv_head);
  const Scalar* const new_value = in.v.at(row, kv_head);
  Scalar* const keys = in.keys.at(slot, kv_head);
  Scalar* const values = in.values.at(slot, kv_head);
#pragma unroll 1
  for (int i = threadIdx.x; i < in.head_dim; i += num_threads) {
    keys[in.keys.offset(length) + i] = new_key[i];
    values[in.values.offset(length) + i] = new_value[i];
  }

  // Nothing below depends on whether there is something to load: a lane whose features are beyond
  // the head has others and a query of 0 for them, and beyond the new token there is it again, with
  // no weight.
  const int feature = (lane & (lanes - 1)) * kPart, num_features = in.head_dim - feature;
  const auto load = [&](const Scalar* head) {
    if constexpr (kAligned) {
      return *reinterpret_cast<const Part<Scalar>*>(head + min(feature, in.head_dim - kPart));
    } else {
      Part<Scalar> part{};
      for (int i = 0; i < kPart; ++i) part.set(i, head[min(feature + i, in.head_dim - 1)]);
      return part;
    }
  };
  float queries[kQueries][kPart];
#pragma unroll
  for (int g = 0; g < kQueries; ++g) {
    const auto query = load(in.q.at(row, head + min(g, num_queries - 1)));
#pragma unroll
    for (int i = 0; i < kPart; ++i) queries[g][i] = i < num_features ? query[i] * in.scale : 0;
  }

  Partial partials[kQueries];
  const int step = 32 >> log_lanes;  // from one key of a lane to its next
  // Attends to the keys from `first` on that the warp loads at a time. Of all but the last ones in
  // a row it is known that they come before the new token.
  const auto attend = [&](int first, auto is_last) {
    const int position = first + (lane >> log_lanes);
    Part<Scalar> key[kLoads], value[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const bool is_past = !is_last || position + j * step < length;
      const int64_t past_key = in.keys.offset(position) + j * in.keys.offset(step);
      const int64_t past_value = in.values.offset(position) + j * in.values.offset(step);
      key[j] = load(is_past ? keys + past_key : new_key);
      value[j] = load(is_past ? values + past_value : new_value);
    }
    float scores[kLoads][kQueries];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
#pragma unroll
      for (int g = 0; g < kQueries; ++g) {
        scores[j][g] = 0;
#pragma unroll
        for (int i = 0; i < kPart; ++i) scores[j][g] += queries[g][i] * key[j][i];
      }
    }
#pragma unroll 1
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
#pragma unroll
        for (int g = 0; g < kQueries; ++g) scores[j][g] += tile.shfl_xor(scores[j][g], offset);
      }
    }
#pragma unroll
    for (int g = 0; g < kQueries; ++g) {
      float largest = partials[g].largest;
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        if (is_last && position + j * step > length) scores[j][g] = -INFINITY;
        largest = fmaxf(largest, scores[j][g]);
      }
      partials[g].rescale(largest);
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
#pragma unroll
      for (int g = 0; g < kQueries; ++g) {
        const float weight = power_of_2(scores[j][g] - partials[g].largest);
        partials[g].sum += weight;
#pragma unroll
        for (int i = 0; i < kPart; ++i) partials[g].values[i] += weight * value[j][i];
      }
    }
  };
  const int keys_of_warp = kLoads * step;  // at a time
  int first = warp * keys_of_warp;
#pragma unroll 1
  for (; first + keys_of_warp <= length; first += num_threads / 32 * keys_of_warp) {
    attend(first, std::false_type());
  }
  if (first <= length) attend(first, std::true_type());

  // The lanes of a warp that have the same features of other keys, ...
#pragma unroll 1
  for (int offset = lanes; offset < 32; offset *= 2) {
#pragma unroll
    for (int g = 0; g < kQueries; ++g) {
      Partial& own = partials[g];
      const float largest = fmaxf(own.largest, tile.shfl_xor(own.largest, offset));
      own.rescale(largest);
      own.sum += tile.shfl_xor(own.sum, offset);
      for (float& x : own.values) x += tile.shfl_xor(x, offset);
    }
  }
  // ... and then the warps, through shared memory.
  const int size = in.partial_size(), warp_size = kQueries * size;
  if (lane < lanes) {
#pragma unroll
    for (int g = 0; g < kQueries; ++g) {
      float* const target = shared + warp * warp_size + g * size;
      if (lane == 0) target[0] = partials[g].largest;
      if (lane == 0) target[1] = partials[g].sum;
      for (int i = 0; i < kPart; ++i) {
        if (i < num_features) target[2 + feature + i] = partials[g].values[i];
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < num_queries * in.head_dim; i += num_threads) {
    const int g = kQueries == 1 ? 0 : i / in.head_dim, d = i - g * in.head_dim;
    const float* const of_first = shared + g * size;
    float largest = -FLT_MAX, sum = 0, weighted = 0;
    for (int w = 0; w < num_threads / 32; ++w) largest = fmaxf(largest, of_first[w * warp_size]);
    for (int w = 0; w < num_threads / 32; ++w) {
      const float* const partial = of_first + w * warp_size;
      const float factor = power_of_2(partial[0] - largest);
      sum += factor * partial[1];
      weighted += factor * partial[2 + d];
    }
    in.out.at(row, head + g)[d] = static_cast<Scalar>(weighted / sum);
  }
}

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
