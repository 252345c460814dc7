// Eight features of a row, as a thread of a GPU loads them: no torch.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

namespace c10 {
struct BFloat16;  // torch's
}

namespace convai_fast {

constexpr int kPart = 8;

// Whether a type is the upper half of float32, as bfloat16 is.
template <typename Scalar>
inline constexpr bool kIsUpperHalf = false;
template <>
inline constexpr bool kIsUpperHalf<c10::BFloat16> = true;

// What a thread has of a row of features: one load of 16 bytes, or two in float32. Words of 32 bits
// are what a register holds: 16-bit numbers by themselves would take twice as many.
template <typename Scalar>
struct alignas(16) Part {
  static constexpr int kInWord = 4 / sizeof(Scalar), kBits = 8 * sizeof(Scalar);
  using Bits = std::conditional_t<kInWord == 2, uint16_t, uint32_t>;
  uint32_t words[kPart / kInWord];

  // Of a part of zeros.
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

}  // namespace convai_fast
