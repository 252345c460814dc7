// The product of some rows and one block of a packed matrix (simd/packed.h).
//
// For some features at a time, rows are widened to what the instructions multiply (bfloat16 to
// float32, bytes to pairs of 16 bits, unless the processor multiplies these), and tiles of a few
// rows multiplied by as many columns as the registers hold sums for.
#include <algorithm>

namespace convai_fast::simd::CONVAI_FAST_ISA {

constexpr int64_t kMostFeatures = 256;  // of which a tile's weights stay in the first-level cache
constexpr int kTileVectors = kWidth == 8 ? 2 : 4;  // of columns, beside Words::kTileRows rows
constexpr int kFewVectors = kWidth == 16 ? 4 : 8;  // beside a single one

// Products of pairs of int16: lane n gets x[0] * w[2n] + x[1] * w[2n + 1].
CONVAI_FAST_INLINE Simd::Int multiply_pairs(Simd::Int x, Simd::Int w) {
#if CONVAI_FAST_WIDTH == 16
  return (Simd::Int)_mm512_madd_epi16((__m512i)x, (__m512i)w);
#elif CONVAI_FAST_WIDTH == 8
  return (Simd::Int)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#elif CONVAI_FAST_X86
  return (Simd::Int)_mm_madd_epi16((__m128i)x, (__m128i)w);
#else
  return (x << 16 >> 16) * (w << 16 >> 16) + (x >> 16) * (w >> 16);
#endif
}

// What a word of 32 bits of x and of the weight, one for each column, add to the sums:
//
//   float32   a feature
//   bfloat16  two features, multiplied at once where the processor does; else x is widened to a
//             word for each
//   int8      four features, likewise; else x is widened to a word of 16 bits each for the even
//             ones and one for the odd ones
template <typename Scalar>
struct Words;

// Of floats, a word a feature.
struct FloatWords {
  using Wide = float;
  using Sums = Simd::Float;
  static CONVAI_FAST_INLINE void add(Sums& sums, float x, Simd::Int w) {
    sums += x * (Simd::Float)w;
  }
};

template <>
struct Words<float> : FloatWords {
  static constexpr int kTileRows = kWidth == 4 ? 3 : 6;
  static constexpr int kOfX = 1;
  static CONVAI_FAST_INLINE Simd::Int part(Simd::Int w, int) { return w; }
  static CONVAI_FAST_INLINE void widen(const float* x, int64_t words, float* to) {
    std::copy_n(x, words, to);
  }
};

#if CONVAI_FAST_BF16

// x as it is.
struct DenseWords {
  static constexpr int kTileRows = 6;
  using Wide = int32_t;
  static constexpr int kOfX = 1;
  static CONVAI_FAST_INLINE Simd::Int part(Simd::Int w, int) { return w; }
  static CONVAI_FAST_INLINE void widen(const void* x, int64_t words, int32_t* to) {
    std::memcpy(to, x, 4 * words);
  }
};

template <>
struct Words<BFloat16> : DenseWords {
  using Sums = Simd::Float;
  static CONVAI_FAST_INLINE void add(Sums& sums, int32_t x, Simd::Int w) {
    sums = (Simd::Float)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(x),
                                         (__m512bh)(__m512i)w);
  }
};

template <>
struct Words<int8_t> : DenseWords {
  using Sums = Simd::Int;
  static CONVAI_FAST_INLINE void add(Sums& sums, int32_t x, Simd::Int w) {
    sums = (Simd::Int)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32(x), (__m512i)w);
  }
};

#else

constexpr int kWidenedRows = kWidth == 16 ? 6 : kWidth == 8 ? 5 : 3;

template <>
struct Words<BFloat16> : FloatWords {
  static constexpr int kTileRows = kWidenedRows;
  static constexpr int kOfX = 2;
  static CONVAI_FAST_INLINE Simd::Int part(Simd::Int w, int odd) {
    return odd ? w & static_cast<int32_t>(0xffff0000) : w << 16;
  }
  static CONVAI_FAST_INLINE void widen(const BFloat16* x, int64_t words, float* to) {
    for (int64_t k = 0; k < 2 * words; ++k) to[k] = to_float(x[k]);
  }
};

template <>
struct Words<int8_t> {
  static constexpr int kTileRows = kWidenedRows;
  using Wide = int32_t;
  static constexpr int kOfX = 2;
  using Sums = Simd::Int;
  static CONVAI_FAST_INLINE Simd::Int part(Simd::Int w, int odd) {
    using Pair = Simd::Pair;
    return (Simd::Int)((Pair)(odd ? (Pair)w : (Pair)w << 8) >> 8);
  }
  static CONVAI_FAST_INLINE void add(Sums& sums, int32_t x, Simd::Int w) {
    sums += multiply_pairs(x - Simd::Int{}, w);
  }
  static CONVAI_FAST_INLINE void widen(const uint8_t* x, int64_t words, int32_t* to) {
    for (int64_t k = 0; k < words; ++k) {
      to[2 * k] = x[4 * k] | x[4 * k + 2] << 16;
      to[2 * k + 1] = x[4 * k + 1] | x[4 * k + 3] << 16;
    }
  }
};

#endif

// What is read from memory next: rows of 64 words, as a block has them, that are fetched to the
// second-level cache during a product: a row beside every `every`-th step of it, a word of
// features.
struct Ahead {
  const int32_t* data = nullptr;
  int64_t rows = 0, every = 1;

  // `count` rows from `row` on, or as many as there are.
  Ahead part(int64_t row, int64_t count) const {
    const int64_t first = std::min(row, rows);
    return {data + first * kBlock, std::min(count, rows - first), every};
  }

  // What is fetched beside tile `i` of `tiles` that take as many steps each.
  Ahead beside(int64_t i, int64_t tiles) const {
    const int64_t first = rows * i / tiles, end = rows * (i + 1) / tiles;
    return {data + first * kBlock, end - first, tiles};
  }

  CONVAI_FAST_INLINE void fetch(int64_t row, int64_t columns = kBlock) const {
    constexpr int64_t kLine = 16;
    for (int64_t n = 0; n < columns; n += kLine) {
      __builtin_prefetch(data + row * kBlock + n, 0, 2);
    }
  }
};

// The sums of `kRows` rows, widened and `stride` apart, and `kVectors` vectors of columns.
template <int kRows, int kVectors, typename Scalar>
CONVAI_FAST_INLINE void add_tile(const typename Words<Scalar>::Wide* x, int64_t stride,
                                 const int32_t* weight, int64_t words,
                                 typename Format<Scalar>::Sum* sums, int64_t sums_stride,
                                 Ahead ahead = {}) {
  using W = Words<Scalar>;
  typename W::Sums tile[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) tile[i][v] = Simd::load(sums + i * sums_stride + v * kWidth);
  }
  int64_t fetched = 0, due = ahead.rows > 0 ? 0 : words;
  for (int64_t k = 0; k < words; ++k) {
    if (k == due) {
      ahead.fetch(fetched++);
      due = fetched < ahead.rows ? due + ahead.every : words;
    }
    Simd::Int w[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) w[v] = Simd::load(weight + k * kBlock + v * kWidth);
#pragma GCC unroll 2
    for (int odd = 0; odd < W::kOfX; ++odd) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const auto factor = x[i * stride + k * W::kOfX + odd];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) W::add(tile[i][v], factor, W::part(w[v], odd));
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) Simd::store(sums + i * sums_stride + v * kWidth, tile[i][v]);
  }
}

// Exactly `rows` rows, fewer than kRows + 1, by a whole block.
template <int kRows, int kVectors, typename Scalar>
CONVAI_FAST_INLINE void add_rows(const typename Words<Scalar>::Wide* x, int64_t stride,
                                 int64_t rows, const int32_t* weight, int64_t words,
                                 typename Format<Scalar>::Sum* sums, int64_t sums_stride,
                                 Ahead ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return add_rows<kRows - 1, kVectors, Scalar>(x, stride, rows, weight, words, sums,
                                                   sums_stride, ahead);
    }
  }
  add_tile<kRows, kVectors, Scalar>(x, stride, weight, words, sums, sums_stride, ahead);
}

// Rows of x by features [first, end) of a block, added to `sums`.
template <typename Scalar>
CONVAI_FAST_INLINE void add_part(const typename Format<Scalar>::Activation* x, int64_t stride,
                                 int64_t rows, const Scalar* block, int64_t columns, int64_t first,
                                 int64_t end, typename Format<Scalar>::Sum* sums,
                                 int64_t sums_stride, Ahead ahead) {
  using W = Words<Scalar>;
  constexpr int64_t kTogether = Format<Scalar>::kTogether;
  constexpr int64_t kStride = kMostFeatures / kTogether * W::kOfX;
  const int64_t tiles = (rows + W::kTileRows - 1) / W::kTileRows;
  typename W::Wide wide[kMostRows * kStride];
  for (; first < end; first += kMostFeatures) {
    const int64_t words = std::min(kMostFeatures, end - first) / kTogether;
    for (int64_t row = 0; row < rows; ++row) {
      W::widen(x + row * stride + first, words, wide + row * kStride);
    }
    const auto* weight = reinterpret_cast<const int32_t*>(block + first * kBlock);
    const Ahead next = ahead.part(first / kTogether, words);
    int64_t n = 0;
    // A single row takes more columns at once: else it has too few sums to keep the multipliers
    // busy.
    for (; rows == 1 && n + kFewVectors * kWidth <= columns; n += kFewVectors * kWidth) {
      add_tile<1, kFewVectors, Scalar>(wide, kStride, weight + n, words, sums + n, sums_stride,
                                       n == 0 ? next : Ahead{});
    }
    const auto add_columns = [&]<int kVectors>() CONVAI_FAST_INLINE_LAMBDA {
      for (; n + (kVectors - 1) * kWidth < columns; n += kVectors * kWidth) {
        for (int64_t row = 0; row < rows; row += W::kTileRows) {
          add_rows<W::kTileRows, kVectors, Scalar>(
              wide + row * kStride, kStride, std::min<int64_t>(W::kTileRows, rows - row),
              weight + n, words, sums + row * sums_stride + n, sums_stride,
              n == 0 ? next.beside(row / W::kTileRows, tiles) : Ahead{});
        }
      }
    };
    add_columns.template operator()<kTileVectors>();
    add_columns.template operator()<1>();
  }
}

// sums [rows, columns] = up to kMostRows rows of x [rows, features] by a block, or its first
// columns, rounded up to a vector; `features` are padded. Meanwhile what is ahead is fetched.
template <typename Scalar>
CONVAI_FAST_INLINE void block_product(const typename Format<Scalar>::Activation* x, int64_t stride,
                                      int64_t rows, const Scalar* block, int64_t columns,
                                      int64_t features, typename Format<Scalar>::Sum* sums,
                                      int64_t sums_stride, Ahead ahead = {}) {
  constexpr int64_t kPart = features_of_part<Scalar>();
  using Sum = typename Format<Scalar>::Sum;
  for (int64_t row = 0; row < rows; ++row) std::fill_n(sums + row * sums_stride, kBlock, Sum{});
  add_part(x, stride, rows, block, columns, 0, std::min(kPart, features), sums, sums_stride, ahead);
  for (int64_t first = kPart; first < features; first += kPart) {
    Sum of_part[kMostRows * kBlock] = {};
    add_part(x, stride, rows, block, columns, first, std::min(first + kPart, features), of_part,
             kBlock, ahead);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t n = 0; n < kBlock; ++n) sums[row * sums_stride + n] += of_part[row * kBlock + n];
    }
  }
}

}  // namespace convai_fast::simd::CONVAI_FAST_ISA
