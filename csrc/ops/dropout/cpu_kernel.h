// Dropout with masks from Philox 4x32-10 (philox.h), 16 counters at a time: no torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd/tile.h"

namespace convai_fast {

struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // what draws a smaller word is dropped
  float scale;         // of what is kept

  Dropout(double p, uint64_t seed)
      : seed(seed),
        threshold(static_cast<uint32_t>(p * 0x1p32)),
        scale(static_cast<float>(1.0 / (1.0 - p))) {}
};

// The four words of the 16 blocks with counters low .. low + 15 and `high`; low is a multiple
// of 16.
template <int kWidth>
struct RandomWords {
  using Word = typename Vectors<kWidth>::Word;
  using Wide = typename Vectors<kWidth>::Wide;
  static constexpr int kVectors = 16 / kWidth;
  Word words[4][kVectors];

  // The product of the lower halves, whatever the upper ones hold.
  static CONVAI_FAST_INLINE Wide multiply(Wide a, Wide b) {
#if CONVAI_FAST_ASSEMBLY
    // In assembly, since GCC multiplies all 64 bits otherwise.
    Wide product;
    if constexpr (kWidth == 4) {
      product = a;
      asm("pmuludq %1, %0" : "+x"(product) : "x"(b));
    } else {
      asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(a), "v"(b));
    }
    return product;
#else
    return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
  }

  CONVAI_FAST_INLINE RandomWords(uint64_t seed, uint64_t low, uint64_t high) {
    // Words are the lower halves of 64 bits, so that products need no shuffles: one vector for even
    // counters and one for odd ones, which are put side by side in the end.
    constexpr int kChains = 2 * kVectors;
    Wide counter[4][kChains] = {};
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) {
      Wide offsets{};
#pragma GCC unroll 8
      for (int i = 0; i < kWidth / 2; ++i) offsets[i] = c / 2 * kWidth + 2 * i + c % 2;
      counter[0][c] = offsets + low;
      counter[1][c] = Wide{} + (low >> 32);
      counter[2][c] = Wide{} + high;
      counter[3][c] = Wide{} + (high >> 32);
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) {
        const Wide product0 = multiply(counter[0][c], Wide{} + 0xD2511F53u);
        const Wide product1 = multiply(counter[2][c], Wide{} + 0xCD9E8D57u);
        counter[0][c] = (product1 >> 32) ^ counter[1][c] ^ (Wide{} + key0);
        counter[1][c] = product1;
        counter[2][c] = (product0 >> 32) ^ counter[3][c] ^ (Wide{} + key1);
        counter[3][c] = product0;
      }
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        words[w][v] = (Word)((counter[w][2 * v] & 0xFFFFFFFFu) | counter[w][2 * v + 1] << 32);
      }
    }
  }
};

inline void store(float x, float* target) { *target = x; }
inline void store(float x, BFloat16* target) { *target = to_bfloat16(x); }

// Elements [begin, end) of x; begin is a multiple of 64. Element n draws word n / 16 % 4 of the
// block with counter n / 64 * 16 + n % 16.
template <int kWidth, typename Scalar>
CONVAI_FAST_INLINE void dropout_body(const Dropout& dropout, const Scalar* x, Scalar* out,
                                     int64_t begin, int64_t end) {
  using S = Simd<kWidth>;
  using Random = RandomWords<kWidth>;
  for (int64_t first = begin; first < end; first += 64) {
    const Random random(dropout.seed, first / 4, 0);
    const int64_t valid = std::min<int64_t>(64, end - first);
    Scalar edge[64] = {};
    const Scalar* source = x + first;
    if (valid < 64) source = std::copy_n(source, valid, edge) - valid;
    float kept[64];
#pragma GCC unroll 16
    for (int v = 0; v < 4 * Random::kVectors; ++v) {
      const auto word = random.words[v / Random::kVectors][v % Random::kVectors];
      const auto scaled = load_weights<kWidth>(source + v * kWidth) * dropout.scale;
      const auto keep = (typename S::Int)(word >= dropout.threshold);
      S::store(kept + v * kWidth, (typename S::Float)((typename S::Int)scaled & keep));
    }
    for (int64_t n = 0; n < valid; ++n) store(kept[n], out + first + n);
  }
}

#if CONVAI_FAST_X86
template <typename Scalar>
CONVAI_FAST_AVX512 void dropout_avx512(const Dropout& dropout, const Scalar* x, Scalar* out,
                                       int64_t begin, int64_t end) {
  dropout_body<16>(dropout, x, out, begin, end);
}
template <typename Scalar>
CONVAI_FAST_AVX2 void dropout_avx2(const Dropout& dropout, const Scalar* x, Scalar* out,
                                   int64_t begin, int64_t end) {
  dropout_body<8>(dropout, x, out, begin, end);
}
#endif
template <typename Scalar>
void dropout_portable(const Dropout& dropout, const Scalar* x, Scalar* out, int64_t begin,
                      int64_t end) {
  dropout_body<4>(dropout, x, out, begin, end);
}

template <typename Scalar>
using DropoutKernel = void (*)(const Dropout&, const Scalar* x, Scalar* out, int64_t begin,
                               int64_t end);

template <typename Scalar>
DropoutKernel<Scalar> dropout_for(Isa isa) {
#if CONVAI_FAST_X86
  if (isa == Isa::kAvx512) return dropout_avx512<Scalar>;
  if (isa == Isa::kAvx2) return dropout_avx2<Scalar>;
#endif
  return dropout_portable<Scalar>;
}

}  // namespace convai_fast
