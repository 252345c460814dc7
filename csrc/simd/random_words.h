// The Philox of philox.h in vectors: 16 counters at a time.

namespace convai_fast::simd::CONVAI_FAST_ISA {

// The four words of the 16 blocks with counters low .. low + 15 and `high`; low is a multiple
// of 16.
struct RandomWords {
  using Word = Simd::Word;
  using Wide = Simd::Wide;
  static constexpr int kVectors = 16 / kWidth;
  Word words[4][kVectors];

  // The product of the lower halves, whatever the upper ones hold. GCC multiplies all 64 bits where
  // it is left to it, and warns of AVX-512's own product without a mask.
  static CONVAI_FAST_INLINE Wide multiply(Wide a, Wide b) {
#if CONVAI_FAST_WIDTH == 16
    return (Wide)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);
#elif CONVAI_FAST_WIDTH == 8
    return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif CONVAI_FAST_X86
    return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
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
        const Wide product0 = multiply(counter[0][c], Wide{} + kPhiloxFactor0);
        const Wide product1 = multiply(counter[2][c], Wide{} + kPhiloxFactor1);
        counter[0][c] = (product1 >> 32) ^ counter[1][c] ^ (Wide{} + key0);
        counter[1][c] = product1;
        counter[2][c] = (product0 >> 32) ^ counter[3][c] ^ (Wide{} + key1);
        counter[3][c] = product0;
      }
      key0 += kPhiloxStep0;
      key1 += kPhiloxStep1;
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

}  // namespace convai_fast::simd::CONVAI_FAST_ISA
