// `add_norm` on a GPU: no torch.
#pragma once

#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>

#include <cmath>
#include <cstdint>

#include "ops/part.cuh"

namespace convai_fast::add_norm {

namespace cg = cooperative_groups;

constexpr int kMaxThreads = 1024;
constexpr int kMaxFeatures = kMaxThreads * kPart;

// All [rows, n_embd] or [n_embd], contiguous.
template <typename Scalar>
struct Input {
  const Scalar *x, *residual, *weight, *bias;  // no bias: null
  Scalar *sum, *normed;
  int n_embd;
  float eps;
  bool rms_norm;
};

// Of each of the two sums of a row, what its warps add to it.
struct BlockScratch {
  float sums[2][kMaxThreads / 32];
};

__device__ inline float sum_of_block(float x, float* sums) {
  const auto tile = cg::tiled_partition<32>(cg::this_thread_block());
  const int lane = threadIdx.x % 32;
  x = cg::reduce(tile, x, cg::plus<float>());
  if (lane == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  return cg::reduce(tile, lane < blockDim.x / 32 ? sums[lane] : 0.0f, cg::plus<float>());
}

// A row a block, and a part of it a thread, which stays in registers. With kAligned all parts are
// whole and begin at multiples of 16 bytes.
template <typename Scalar, bool kAligned>
__device__ void add_norm_block(const Input<Scalar>& in, BlockScratch& scratch) {
  const int first = threadIdx.x * kPart, count = min(in.n_embd - first, kPart);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * in.n_embd + first;
  const auto load = [&](const Scalar* source) {
    Part<Scalar> part{};
    if constexpr (kAligned) {
      if (count > 0) part = *reinterpret_cast<const Part<Scalar>*>(source);
    } else {
      for (int i = 0; i < kPart; ++i) {
        if (i < count) part.set(i, source[i]);
      }
    }
    return part;
  };
  const auto store = [&](const Part<Scalar>& part, Scalar* target) {
    if constexpr (kAligned) {
      if (count > 0) *reinterpret_cast<Part<Scalar>*>(target) = part;
    } else {
      for (int i = 0; i < kPart; ++i) {
        if (i < count) target[i] = static_cast<Scalar>(part[i]);
      }
    }
  };

  const auto x = load(in.x + begin), residual = load(in.residual + begin);
  const auto weight = load(in.weight + first);
  const auto bias = in.bias != nullptr ? load(in.bias + first) : Part<Scalar>{};
  Part<Scalar> sum{};
  for (int i = 0; i < kPart; ++i) sum.set(i, static_cast<Scalar>(x[i] + residual[i]));
  store(sum, in.sum + begin);

  float mean = 0, squares = 0;
  if (!in.rms_norm) {
    float total = 0;
    for (int i = 0; i < kPart; ++i) total += sum[i];
    mean = sum_of_block(total, scratch.sums[0]) / in.n_embd;
  }
  for (int i = 0; i < kPart; ++i) squares += i < count ? (sum[i] - mean) * (sum[i] - mean) : 0;
  const float variance = sum_of_block(squares, scratch.sums[1]) / in.n_embd;
  const float scale = 1 / sqrtf(variance + in.eps);
  Part<Scalar> normed{};
  for (int i = 0; i < kPart; ++i) {
    normed.set(i, static_cast<Scalar>((sum[i] - mean) * scale * weight[i] + bias[i]));
  }
  store(normed, in.normed + begin);
}

inline int threads_for(int64_t n_embd) { return (n_embd + 32 * kPart - 1) / (32 * kPart) * 32; }

template <typename Scalar>
bool is_aligned(const Input<Scalar>& in) {
  uintptr_t bits = in.n_embd % kPart;
  for (const void* data : {static_cast<const void*>(in.x), static_cast<const void*>(in.residual),
                           static_cast<const void*>(in.weight), static_cast<const void*>(in.bias),
                           static_cast<const void*>(in.sum), static_cast<const void*>(in.normed)}) {
    bits |= reinterpret_cast<uintptr_t>(data);
  }
  return bits % 16 == 0;
}

}  // namespace convai_fast::add_norm
