// 16-bit floating point numbers, as they lie in memory, and float32.
#pragma once

#include <bit>
#include <cstdint>

namespace convai_fast::simd {

// The upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

// IEEE 754 binary16.
struct Half {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

// Without a branch, so that the compiler makes vectors of it: exponent and mantissa moved into
// place and scaled by the difference of the exponents' biases, which also serves denormal numbers.
inline float to_float(Half x) {
  const uint32_t magnitude = x.bits & 0x7FFFu, sign = (x.bits & 0x8000u) << 16;
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t infinite = magnitude >= 0x7C00u ? 0x7F800000u : 0u;  // or NaN
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | infinite | sign);
}

inline void store(float x, float* target) { *target = x; }

// To the nearest, and to even in the middle; a NaN stays one.
inline void store(float x, BFloat16* target) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  target->bits = static_cast<uint16_t>(rounded);
}

}  // namespace convai_fast::simd
