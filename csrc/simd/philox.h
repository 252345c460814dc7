// Philox 4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3" (SC 2011). CPU and CUDA share it, so that a seed draws the same bits on both.
#pragma once

#include <cstdint>

#include "simd/host_device.h"

namespace convai_fast::simd {

constexpr uint32_t kPhiloxFactor0 = 0xD2511F53u, kPhiloxFactor1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxStep0 = 0x9E3779B9u, kPhiloxStep1 = 0xBB67AE85u;  // of the key, a round

// The first 32-bit word for key `seed` and counter `step`.
CONVAI_FAST_HOST_DEVICE inline uint32_t philox(uint64_t seed, uint64_t step) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t counter[4] = {static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32), 0, 0};
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{counter[0]} * kPhiloxFactor0;
    const uint64_t product1 = uint64_t{counter[2]} * kPhiloxFactor1;
    const uint32_t high0 = static_cast<uint32_t>(product0 >> 32);
    const uint32_t high1 = static_cast<uint32_t>(product1 >> 32);
    counter[0] = high1 ^ counter[1] ^ key0;
    counter[1] = static_cast<uint32_t>(product1);
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = static_cast<uint32_t>(product0);
    key0 += kPhiloxStep0;
    key1 += kPhiloxStep1;
  }
  return counter[0];
}

// A uniform number in [0, 1), a multiple of 2^-32: exact in double, so that it is never 1.
CONVAI_FAST_HOST_DEVICE inline double philox_uniform(uint64_t seed, uint64_t step) {
  return philox(seed, step) * 0x1p-32;
}

}  // namespace convai_fast::simd
