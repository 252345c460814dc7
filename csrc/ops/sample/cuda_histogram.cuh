// A block's weights in bins, in shared memory.
#pragma once

#include <cstdint>

#include "ops/sample/cuda_logits.cuh"

namespace convai_fast::sample {

constexpr int kBins = 2 * kThreads, kLogBins = 10;  // two neighbours a thread

struct Histogram {
  uint32_t low[kBins], high[kBins];  // the halves of weights of 64 bits

  __device__ uint64_t weight(int bin) const {
    return low[bin] + (static_cast<uint64_t>(high[bin]) << 32);
  }
  __device__ void clear(int bin) { low[bin] = high[bin] = 0; }

  __device__ void add(int bin, uint32_t weight) {
    if (weight != 0) atomicAdd(&low[bin], weight);
  }
  // From two additions of 32 bits, which shared memory does natively: the second one is needed only
  // for a mass of 2^32 or more, exp(-5.5), and where the lower half wraps around.
  __device__ void add(int bin, uint64_t weight) {
    if (weight == 0) return;
    const uint32_t of_low = static_cast<uint32_t>(weight);
    const uint32_t old = atomicAdd(&low[bin], of_low);
    const uint32_t of_high = static_cast<uint32_t>(weight >> 32) + (old + of_low < old);
    if (of_high != 0) atomicAdd(&high[bin], of_high);
  }
};

}  // namespace convai_fast::sample
