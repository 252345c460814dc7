// The vector layer of one instruction set: arithmetic here, then what is built of it. Included by
// each_isa.h for each of them, hence no #pragma once here nor in the files named at the end.
#include <cstring>

namespace convai_fast::simd::CONVAI_FAST_ISA {

constexpr int kWidth = CONVAI_FAST_WIDTH;

// Of fewer floats, too, for sums by halves.
template <int width>
struct SimdOf : Vectors<width> {
  using typename Vectors<width>::Float;
  using typename Vectors<width>::Int;
  using typename Vectors<width>::Word;
  using typename Vectors<width>::Halves;

  static CONVAI_FAST_INLINE Float load(const float* source) {
    Float x;
    std::memcpy(&x, source, sizeof(x));
    return x;
  }

  static CONVAI_FAST_INLINE void store(float* target, Float x) {
    std::memcpy(target, &x, sizeof(x));
  }

  static CONVAI_FAST_INLINE Float load(const BFloat16* source) {
#if CONVAI_FAST_WIDTH > 4 && !defined(__clang__)
    // In assembly, since GCC makes four instructions of the conversion, and of loops with the
    // intrinsic such that want for registers.
    Int wide;
    asm("vpmovzxwd %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const BFloat16(*)[width]>(source)));
    return (Float)(wide << 16);
#else
    Halves halves;
    std::memcpy(&halves, source, sizeof(halves));
    return (Float)(__builtin_convertvector(halves, Int) << 16);
#endif
  }

  static CONVAI_FAST_INLINE Int load(const int32_t* source) {
    Int x;
    std::memcpy(&x, source, sizeof(x));
    return x;
  }

  static CONVAI_FAST_INLINE void store(int32_t* target, Int x) {
    std::memcpy(target, &x, sizeof(x));
  }

  // To bfloat16, in the upper half of each lane, the nearest, and the even one in the middle; a NaN
  // stays one.
  static CONVAI_FAST_INLINE Word rounded(Float x) {
    const Int bits = (Int)x;
    return (Word)(x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000);
  }

  static CONVAI_FAST_INLINE void store(BFloat16* target, Float x) {
    const auto halves = __builtin_convertvector(rounded(x) >> 16, Halves);
    std::memcpy(target, &halves, sizeof(halves));
  }

  // `first` and `second` of each lane side by side.
  static CONVAI_FAST_INLINE void store_pairs(BFloat16* target, Float first, Float second) {
    const Word pairs = rounded(first) >> 16 | (rounded(second) & 0xffff0000);
    std::memcpy(target, &pairs, sizeof(pairs));
  }

  // The nearest whole numbers, the even ones in the middle, of numbers up to 2^22.
  static CONVAI_FAST_INLINE Int nearest(Float x) {
    constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23
    return __builtin_convertvector((x + kRounder) - kRounder, Int);
  }

  // Clamped to 0 ... 255.
  static CONVAI_FAST_INLINE void store_bytes(uint8_t* target, Int x) {
    const Int clamped = x < 0 ? Int{} : x > 255 ? x - x + 255 : x;
    const auto bytes = __builtin_convertvector(clamped, typename Vectors<width>::Quarters);
    std::memcpy(target, &bytes, sizeof(bytes));
  }

  static CONVAI_FAST_INLINE Float broadcast(float x) { return x - Float{}; }

  // x where the mask is set, else 0.
  static CONVAI_FAST_INLINE Float where(Int mask, Float x) { return (Float)(mask & (Int)x); }

  // A bit for each lane that the mask sets.
  static CONVAI_FAST_INLINE uint64_t lanes(Int mask) {
#if CONVAI_FAST_WIDTH == 16
    return _mm512_movepi32_mask((__m512i)mask);
#elif CONVAI_FAST_WIDTH == 8
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
    uint64_t bits = 0;
    for (int i = 0; i < width; ++i) bits |= static_cast<uint64_t>(mask[i] & 1) << i;
    return bits;
#endif
  }

  static CONVAI_FAST_INLINE Float max(Float a, Float b) { return a > b ? a : b; }

  // By halves: the fewest steps one after another.
  static CONVAI_FAST_INLINE float sum(Float x) {
    if constexpr (width > 4) {
      typename Vectors<width / 2>::Float halves[2];
      std::memcpy(halves, &x, sizeof(x));
      return SimdOf<width / 2>::sum(halves[0] + halves[1]);
    } else {
      return (x[0] + x[2]) + (x[1] + x[3]);
    }
  }

  static CONVAI_FAST_INLINE float max(Float x) {
    if constexpr (width > 4) {
      typename Vectors<width / 2>::Float halves[2];
      std::memcpy(halves, &x, sizeof(x));
      return SimdOf<width / 2>::max(SimdOf<width / 2>::max(halves[0], halves[1]));
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

  // x / (1 + e^-x), also called swish (Ramachandran et al. 2017, arXiv 1710.05941).
  static CONVAI_FAST_INLINE Float silu(Float x) {
    const Float small = exp(x > 0 ? -x : x);
    return x * (x > 0 ? broadcast(1.0f) : small) / (small + 1.0f);
  }

  // The tanh approximation of GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415), written with
  // (1 + tanh(y / 2)) / 2 = 1 / (1 + e^-y) and y = 2 sqrt(2 / pi) (x + 0.044715 x^3).
  static CONVAI_FAST_INLINE Float gelu(Float x) {
    const Float y = x * (x * x * 0.0713548162726f + 1.59576912161f);
    const Float small = exp(y > 0 ? -y : y);
    return x * (y > 0 ? broadcast(1.0f) : small) / (small + 1.0f);
  }

  // Its slope, s + x s (1 - s) y' with s = 1 / (1 + e^-y).
  static CONVAI_FAST_INLINE Float gelu_slope(Float x) {
    const Float square = x * x;
    const Float y = x * (square * 0.0713548162726f + 1.59576912161f);
    const Float small = exp(y > 0 ? -y : y);
    const Float share = 1.0f / (small + 1.0f), other = small * share;
    const Float rise = x * (square * 0.2140644488178f + 1.59576912161f);  // x y'
    return (y > 0 ? share : other) + share * other * rise;
  }
};

using Simd = SimdOf<kWidth>;

}  // namespace convai_fast::simd::CONVAI_FAST_ISA

#include "simd/block_product.h"
#include "simd/part.h"
#include "simd/random_words.h"
#include "simd/round_to.h"
#include "simd/softmax.h"
