// What a token weighs.
#pragma once

#include <cmath>
#include <cstdint>

namespace convai_fast::sample {

// A token's *gap*, (largest logit - its logit) / temperature, is what its probability is below the
// largest, as a power of e. Its *key*, the bits of the gap, orders tokens as the gap does, since
// non-negative floats order like their bits: the likeliest token has key 0.
//
// Its *mass* is exp(-gap), rounded down to units of 2^-40. From a gap of 28 on (2^-40.4) a token
// has no mass and is never drawn; 50,000 such tokens together should be, once in 3e7 draws. The
// mass of a row is at least the 2^40 of its largest logit, and fits 64 bits for vocabularies below
// 2^24.
constexpr int kMasslessGap = 28;
constexpr uint32_t kMasslessKey = 0x41e00000;  // the bits of 28.0f

__device__ inline uint64_t mass(uint32_t key) {
  const float power = __uint_as_float(min(key, kMasslessKey)) * -1.44269504f;  // of 2
#ifdef __CUDA_ARCH__
  float result;  // a normal number, so that exp2f's care for others is not needed
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(power));
#else
  const float result = exp2f(power);
#endif
  // Shifts take fewer cycles than a conversion to 64 bits: with a mantissa of 24 bits the float is
  // mantissa * 2^(exponent - 150), from 2^-40.4 to 1.
  const uint32_t bits = __float_as_uint(result);
  const uint64_t mantissa = (bits & 0x7fffff) | 0x800000;
  return mantissa << 24 >> (134 - (bits >> 23));
}

}  // namespace convai_fast::sample
