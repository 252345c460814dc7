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

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "ops/decode_attention/cuda_input.cuh"
#include "ops/part.cuh"

namespace convai_fast::decode_attention {

namespace cg = cooperative_groups;

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

}  // namespace convai_fast::decode_attention
