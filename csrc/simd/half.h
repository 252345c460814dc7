// 16-bit floating point numbers to float32, exactly, on any processor.
#pragma once

#include <bit>
#include <cstdint>

namespace convai_fast {

inline float widen_bfloat16(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

// Without a branch, so that the compiler makes vectors of it: exponent and mantissa moved into
// place and scaled by the difference of the exponents' biases, which also serves denormal numbers.
inline float widen_half(uint16_t value) {
  const uint32_t magnitude = value & 0x7FFFu, sign = (value & 0x8000u) << 16;
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t infinite = magnitude >= 0x7C00u ? 0x7F800000u : 0u;  // or NaN
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | infinite | sign);
}

}  // namespace convai_fast
