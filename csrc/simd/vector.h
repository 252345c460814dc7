// Vectors of the width that an instruction set has, in the compiler's own vector extension, so that
// a kernel is written once and compiled for each: kWidth is 4 (portable), 8 (AVX2) or 16 (AVX-512)
// floats. Whatever works on vectors must be inlined into a function that has the target attribute.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd/isa.h"

// Clang checks the operands of assembly before it inlines, and needs it less: it makes one
// instruction of a conversion.
#if CONVAI_FAST_X86 && !defined(__clang__)
#define CONVAI_FAST_ASSEMBLY 1
#else
#define CONVAI_FAST_ASSEMBLY 0
#endif

#define CONVAI_FAST_INLINE __attribute__((always_inline)) inline
#define CONVAI_FAST_INLINE_LAMBDA __attribute__((always_inline))

namespace convai_fast {

// The size of a vector type must not depend on a template's parameter.
template <int kWidth>
struct Vectors;

#define CONVAI_FAST_VECTORS(width)                                 \
  template <>                                                      \
  struct Vectors<width> {                                          \
    typedef float Float __attribute__((vector_size(4 * width)));   \
    typedef int32_t Int __attribute__((vector_size(4 * width)));   \
    typedef uint32_t Word __attribute__((vector_size(4 * width))); \
    typedef uint64_t Wide __attribute__((vector_size(4 * width))); \
    typedef int16_t Pair __attribute__((vector_size(4 * width)));  \
    typedef uint16_t Half __attribute__((vector_size(2 * width))); \
    typedef int8_t Bytes __attribute__((vector_size(2 * width)));  \
  };
CONVAI_FAST_VECTORS(4)
CONVAI_FAST_VECTORS(8)
CONVAI_FAST_VECTORS(16)
#undef CONVAI_FAST_VECTORS

template <int kWidth>
struct Simd : Vectors<kWidth> {
  using typename Vectors<kWidth>::Float;
  using typename Vectors<kWidth>::Int;
  using typename Vectors<kWidth>::Half;

  static CONVAI_FAST_INLINE Float load(const float* source) {
    Float x;
    std::memcpy(&x, source, sizeof(x));
    return x;
  }

  static CONVAI_FAST_INLINE void store(float* target, Float x) {
    std::memcpy(target, &x, sizeof(x));
  }

  // A bfloat16 is the upper half of a float.
  static CONVAI_FAST_INLINE Float load_bfloat16(const uint16_t* source) {
#if CONVAI_FAST_ASSEMBLY
    if constexpr (kWidth > 4) {
      Int wide;  // in assembly, since GCC makes four instructions of the conversion
      asm("vpmovzxwd %1, %0"
          : "=v"(wide)
          : "m"(*reinterpret_cast<const uint16_t (*)[kWidth]>(source)));
      return (Float)(wide << 16);
    }
#endif
    Half halves;
    std::memcpy(&halves, source, sizeof(halves));
    return (Float)(__builtin_convertvector(halves, Int) << 16);
  }

  static CONVAI_FAST_INLINE Float broadcast(float x) { return x - Float{}; }

  static CONVAI_FAST_INLINE Float max(Float a, Float b) { return a > b ? a : b; }

  // By halves: the fewest steps one after another.
  static CONVAI_FAST_INLINE float sum(Float x) {
    if constexpr (kWidth > 4) {
      typename Vectors<kWidth / 2>::Float halves[2];
      std::memcpy(halves, &x, sizeof(x));
      return Simd<kWidth / 2>::sum(halves[0] + halves[1]);
    } else {
      return (x[0] + x[2]) + (x[1] + x[3]);
    }
  }

  static CONVAI_FAST_INLINE float max(Float x) {
    if constexpr (kWidth > 4) {
      typename Vectors<kWidth / 2>::Float halves[2];
      std::memcpy(halves, &x, sizeof(x));
      return Simd<kWidth / 2>::max(Simd<kWidth / 2>::max(halves[0], halves[1]));
    } else {
      const float even = x[0] > x[2] ? x[0] : x[2], odd = x[1] > x[3] ? x[1] : x[3];
      return even > odd ? even : odd;
    }
  }

  // e^x for x <= 0, to about 2 units in the last place; 1 at 0, and 0 below e^-87.3, where results
  // would no longer be normal. Cody-Waite reduction x = n ln 2 + r and a polynomial of degree 6 on
  // [-ln 2 / 2, ln 2 / 2] (the coefficients of Cephes' expf, Moshier 1989).
  static CONVAI_FAST_INLINE Float exp(Float x) {
    constexpr float kSmallest = -87.33654f, kRounder = 12582912.0f;  // 1.5 * 2^23
    const Float clamped = max(x, broadcast(kSmallest));
    const Float n = (clamped * 1.44269504f + kRounder) - kRounder;
    const Float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    Float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Int scaled = (Int)p + (__builtin_convertvector(n, Int) << 23);
    const Float result = (Float)(x < kSmallest ? Int{} : scaled);
    return x == x ? result : x;  // a NaN stays one
  }

  // The tanh approximation of GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415), written with
  // (1 + tanh(y)) / 2 = 1 / (1 + e^-2y).
  static CONVAI_FAST_INLINE Float gelu(Float x) {
    const Float y = x * (x * x * 0.0713548162726f + 1.59576912161f);  // 2 sqrt(2/pi) (x + .0447x^3)
    const Float small = exp(y > 0 ? -y : y);
    return x * (y > 0 ? broadcast(1.0f) : small) / (small + 1.0f);
  }
};

}  // namespace convai_fast
