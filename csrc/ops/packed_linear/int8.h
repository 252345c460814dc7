// The products of `packed_linear` with int8 weights.
#include "ops/packed_linear/float.h"

namespace convai_fast::packed_linear::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;

// Products of pairs of int16: lane n of the sums gets x[0] * w[2n] + x[1] * w[2n + 1].
struct PairProducts {
  using Int = Simd::Int;
  using Wide = Simd::Pair;

  static CONVAI_FAST_INLINE Wide load(const int8_t* source) {
    Simd::Bytes bytes;
    std::memcpy(&bytes, source, sizeof(bytes));
#if CONVAI_FAST_WIDTH == 16  // GCC makes five instructions of the conversion
    return (Wide)_mm512_cvtepi8_epi16((__m256i)bytes);
#elif CONVAI_FAST_WIDTH == 8
    return (Wide)_mm256_cvtepi8_epi16((__m128i)bytes);
#else
    return __builtin_convertvector(bytes, Wide);
#endif
  }

  static CONVAI_FAST_INLINE void accumulate(Int& sums, Int pairs, Wide w) {
#if CONVAI_FAST_WIDTH == 16
    sums += (Int)_mm512_madd_epi16((__m512i)pairs, (__m512i)w);
#elif CONVAI_FAST_WIDTH == 8
    sums += (Int)_mm256_madd_epi16((__m256i)pairs, (__m256i)w);
#elif CONVAI_FAST_X86
    sums += (Int)_mm_madd_epi16((__m128i)pairs, (__m128i)w);
#else
    // The low and the high half of each 32 bits, with their signs.
    const Int both = (Int)w;
    sums += (pairs << 16 >> 16) * (both << 16 >> 16) + (pairs >> 16) * (both >> 16);
#endif
  }
};

template <int kRows, int kPanels>
CONVAI_FAST_INLINE void multiply_int8_tile(const Arguments& a, int64_t row, int64_t panel) {
  constexpr int kVectors = kPanel / kWidth;
  const int64_t stride = a.in_features + a.in_features % 2;
  const int16_t* x = static_cast<const int16_t*>(a.x) + row * stride;
  const int8_t* weight = static_cast<const int8_t*>(a.weight) + panel * stride * kPanel;
  Simd::Int sums[kRows][kPanels * kVectors] = {};
  for (int64_t k = 0; k < stride; k += 2) {
    PairProducts::Wide w[kPanels * kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kPanels * kVectors; ++v) {
      w[v] = PairProducts::load(weight + v / kVectors * stride * kPanel + k * kPanel +
                                v % kVectors * 2 * kWidth);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      int32_t pair;
      std::memcpy(&pair, x + i * stride + k, sizeof(pair));
      const Simd::Int pairs = pair - Simd::Int{};
#pragma GCC unroll 16
      for (int v = 0; v < kPanels * kVectors; ++v)
        PairProducts::accumulate(sums[i][v], pairs, w[v]);
    }
  }
  const int64_t first = panel * kPanel;
  const int64_t valid = std::min<int64_t>(kPanels * kPanel, a.out_features - first);
  float edge[kPanels * kPanel] = {};
  const float* scales =
      valid == kPanels * kPanel ? a.scales + first : copy_to(edge, a.scales + first, valid);
  Tile<kRows, kPanels> tile;
#pragma GCC unroll 16
  for (int v = 0; v < kPanels * kVectors; ++v) {
    const auto scale = Simd::load(scales + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      tile.sums[i][v] =
          __builtin_convertvector(sums[i][v], Simd::Float) * (scale * a.x_scales[row + i]);
    }
  }
  finish(tile, a, row, panel);
}

}  // namespace convai_fast::packed_linear::CONVAI_FAST_ISA
