// Packing, transposing and rounding around the products, for one instruction set: no torch.
//
// All of it moves words of 32 bits: a float, or two bfloat16 that are multiplied together. So the
// transposed tile of two features and two columns of bfloat16
//
//   columns      a0 a1        becomes two words for each       [a0 a1] [b0 b1]
//                b0 b1        pair of features
#include <algorithm>
#include <cstring>

#include "ops/linear/product.h"

namespace convai_fast::linear::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;
using simd::BFloat16;
using simd::Format;
using simd::kBlock;

constexpr int64_t kTile = 16;  // words of a cache line

// 64 values of each of the lines that are multiplied together, side by side; of bfloat16 two lines.
template <typename Value>
CONVAI_FAST_INLINE void join(const Value* first, const Value*, float* to) {
  std::copy_n(first, kBlock, to);
}

template <typename Value>
CONVAI_FAST_INLINE void join(const Value* first, const Value* second, BFloat16* to) {
  for (int64_t n = 0; n < kBlock; n += kWidth, to += 2 * kWidth) {
    Simd::store_pairs(to, Simd::load(first + n), Simd::load(second + n));
  }
}

// The first `words` words of each of some lines, up to 16, become as many lines: word by word.
template <typename Scalar>
CONVAI_FAST_INLINE void turn(const Scalar* from, int64_t from_stride, int64_t lines, int64_t words,
                             Scalar* to, int64_t to_stride) {
  constexpr int64_t kTogether = Format<Scalar>::kTogether;
  for (int64_t word = 0; word < words; ++word, to += to_stride) {
#pragma GCC unroll 16
    for (int64_t line = 0; line < lines; ++line) {
      std::memcpy(to + line * kTogether, from + line * from_stride + word * kTogether, 4);
    }
  }
}

// `features` features of the block of b that begins at `column`, packed.
template <typename Scalar, typename Value>
CONVAI_FAST_TARGET void pack_kernel(const Matrix<Value>& b, int64_t first, int64_t features,
                                    int64_t column, Scalar* to) {
  constexpr int64_t kTogether = Format<Scalar>::kTogether;
  const int64_t columns = std::min(kBlock, b.columns - column);
  const int64_t valid = std::clamp<int64_t>(b.rows - first, 0, features);
  if (b.column_stride == 1) {
    const Value zeros[kBlock] = {};
    Value edges[kTogether][kBlock] = {};
    const Value* lines[kTogether];
    for (int64_t f = 0; f < features; f += kTogether, to += kTogether * kBlock) {
      for (int64_t i = 0; i < kTogether; ++i) {
        lines[i] = f + i < valid ? b.at(first + f + i, column) : zeros;
        if (columns < kBlock) lines[i] = std::copy_n(lines[i], columns, edges[i]) - columns;
      }
      join(lines[0], lines[kTogether - 1], to);
    }
    return;
  }
  Scalar lines[kTile * kBlock] = {};
  for (int64_t n = 0; n < kBlock; n += kTile, to += kTile * kTogether) {
    for (int64_t f = 0; f < features; f += kBlock) {
      const int64_t count = std::clamp<int64_t>(valid - f, 0, kBlock);
      if (count < kBlock || n + kTile > columns) std::fill_n(lines, kTile * kBlock, Scalar{});
      for (int64_t i = 0; i < std::min(kTile, columns - n); ++i) {
        round_to(b.at(first + f, column + n + i), count, lines + i * kBlock);
      }
      turn(lines, kBlock, kTile, std::min(kBlock, features - f) / kTogether, to + f * kBlock,
           kBlock * kTogether);
    }
  }
}

// The 64 columns of x that begin at `column`, as `transpose` says.
template <typename Scalar>
CONVAI_FAST_TARGET void transpose_kernel(const Scalar* x, int64_t rows, int64_t columns,
                                         int64_t features, int64_t column, Scalar* to,
                                         float* sums) {
  constexpr int64_t kTogether = Format<Scalar>::kTogether, kRows = kTile * kTogether;
  const int64_t valid = std::min(kBlock, columns - column);
  const Scalar zeros[kBlock] = {};
  Scalar edges[kTogether][kBlock] = {}, joined[kTile * kBlock * kTogether];
  const Scalar* lines[kTogether];
  float column_sums[kBlock] = {};
  for (int64_t first = 0; first < features; first += kRows) {
    for (int64_t row = first; row < first + kRows; row += kTogether) {
      for (int64_t i = 0; i < kTogether; ++i) {
        lines[i] = row + i < rows ? x + (row + i) * columns + column : zeros;
        if (valid < kBlock) lines[i] = std::copy_n(lines[i], valid, edges[i]) - valid;
        for (int64_t n = 0; n < kBlock; n += kWidth) {
          Simd::store(column_sums + n, Simd::load(column_sums + n) + Simd::load(lines[i] + n));
        }
      }
      join(lines[0], lines[kTogether - 1], joined + (row - first) * kBlock);
    }
    turn(joined, kBlock * kTogether, std::min(kRows, features - first) / kTogether, valid,
         to + column * features + first, features);
  }
  if (sums) std::copy_n(column_sums, valid, sums + column);
}

// `sums` [rows, 64], `sums_stride` apart, with the bias, to the block of out that begins at `out`.
template <typename Out>
CONVAI_FAST_TARGET void finish_kernel(const float* sums, int64_t sums_stride, int64_t rows,
                                      const float* bias, int64_t columns, Out* out,
                                      int64_t out_stride) {
  float bias_edge[kBlock] = {}, finished[kBlock];
  if (bias) std::copy_n(bias, columns, bias_edge);
  for (; rows > 0; --rows, sums += sums_stride, out += out_stride) {
    for (int64_t n = 0; n < kBlock; n += kWidth) {
      Simd::store(finished + n, Simd::load(sums + n) + Simd::load(bias_edge + n));
    }
    round_to(finished, columns, out);
  }
}

}  // namespace convai_fast::linear::CONVAI_FAST_ISA
