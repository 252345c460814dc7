// The matrix products of a block of queries, and the packed arrays that they are made of: in rows;
// joined, rows 2n and 2n + 1 of bfloat16 side by side as its products sum over them; or in panels.
#include "ops/branch_attention/rows.h"
#include "ops/branch_attention/tile.h"

namespace convai_fast::branch_attention::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;

// out[m][n] (+)= sum over k < depth of x[m * x_row + k * x_step] * weight[k][n], where the 16
// weights of k are at k * stride and those of the next panel panel_stride further on, all in words;
// then times `factor`. The number of rows is a multiple of 8.
template <bool kAccumulate, typename Operand>
CONVAI_FAST_INLINE void multiply(int64_t rows, int64_t panels, int64_t depth, const Operand* x,
                                 int64_t x_row, int64_t x_step, const Operand* weight,
                                 int64_t stride, int64_t panel_stride, float* out,
                                 int64_t out_stride, float factor = 1.0f) {
  constexpr int kRows = kWidth == 16 ? 8 : kWidth == 8 ? 4 : 2;
  constexpr int kPanels = kWidth == 16 ? 2 : 1;
  constexpr int64_t kTogether = Format<Operand>::kTogether;
  const auto tiles = [&](auto tile, int64_t panel) CONVAI_FAST_INLINE_LAMBDA {
    for (int64_t m = 0; m < rows; m += kRows) {
      float* target = out + m * out_stride + panel * kPanel;
      tile.clear();
      if constexpr (kAccumulate) {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) tile.load_row(i, target + i * out_stride);
      }
      tile.add_products(x + m * x_row * kTogether, x_row, x_step,
                        weight + panel * panel_stride * kTogether, stride, panel_stride, depth);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) tile.store_row(i, target + i * out_stride, factor);
    }
  };
  int64_t panel = 0;
  for (; panel + kPanels <= panels; panel += kPanels) {
    tiles(Tile<Operand, kRows, kPanels>{}, panel);
  }
  for (; panel < panels; ++panel) tiles(Tile<Operand, kRows, 1>{}, panel);
}

// Copies a head of a row's tokens.
template <typename Scalar, typename Operand>
CONVAI_FAST_INLINE void pack(const Row& row, const Heads<const Scalar>& source, int64_t head,
                             Operand* packed) {
  const int64_t head_dim = source.head_dim, dim = round_up(head_dim, kPanel);
  for (int64_t s = 0; s < row.num_segments; ++s) {
    const Segment& segment = row.segments[s];
    Operand* target = packed + segment.packed * dim;
    for (int64_t i = 0; i < segment.count; ++i, target += dim) {
      const Scalar* token = source.at(segment.first + i, head);
      if constexpr (std::is_same_v<Scalar, Operand>) {
        std::copy_n(token, head_dim, target);
      } else {
        int64_t d = 0;
        for (; d + kWidth <= head_dim; d += kWidth) Simd::store(target + d, Simd::load(token + d));
        for (; d < head_dim; ++d) target[d] = simd::to_float(token[d]);
      }
      std::fill_n(target + head_dim, dim - head_dim, Operand{});
    }
    std::fill_n(target, (round_up(segment.count, kPanel) - segment.count) * dim, Operand{});
  }
}

// The reverse of `pack`, times a factor.
template <typename Scalar>
CONVAI_FAST_INLINE void unpack(const Row& row, const float* packed, float factor, int64_t head,
                               const Heads<Scalar>& target) {
  const int64_t dim = round_up(target.head_dim, kPanel);
  for (int64_t s = 0; s < row.num_segments; ++s) {
    const Segment& segment = row.segments[s];
    for (int64_t i = 0; i < segment.count; ++i) {
      Scalar* token = target.at(segment.first + i, head);
      for (int64_t d = 0; d < target.head_dim; ++d) {
        simd::store(packed[(segment.packed + i) * dim + d] * factor, token + d);
      }
    }
  }
}

// [tokens, dim] to panels of words, [tokens / 16, words, 16].
template <typename Operand>
CONVAI_FAST_INLINE void transpose(const Operand* packed, int64_t tokens, int64_t dim,
                                  Operand* panels) {
  constexpr int64_t kTogether = Format<Operand>::kTogether;
  for (int64_t first = 0; first < tokens; first += kPanel) {
    const Operand* source = packed + first * dim;
    for (int64_t d = 0; d < dim; d += kTogether) {
      for (int64_t i = 0; i < kPanel; ++i, panels += kTogether) {
        std::memcpy(panels, source + i * dim + d, sizeof(int32_t));
      }
    }
  }
}

// Rows of `columns` numbers, `stride` apart, in rows of the format Operand at `to`, or where they
// are if that is theirs.
template <typename Operand>
CONVAI_FAST_INLINE const Operand* rounded(const float* x, int64_t rows, int64_t columns,
                                          int64_t stride, Operand* to) {
  if constexpr (std::is_same_v<Operand, float>) {
    return x;
  } else {
    for (int64_t i = 0; i < rows * stride; i += stride) {
      for (int64_t n = 0; n < columns; n += kWidth) {
        Simd::store(to + i + n, Simd::load(x + i + n));
      }
    }
    return to;
  }
}

// The same, joined. The number of rows is even.
template <typename Operand, typename Scalar>
CONVAI_FAST_INLINE const Operand* joined(const Scalar* x, int64_t rows, int64_t columns,
                                         int64_t stride, Operand* to) {
  if constexpr (std::is_same_v<Operand, float>) {
    return x;
  } else {
    for (int64_t i = 0; i < rows * stride; i += 2 * stride) {
      for (int64_t n = 0; n < columns; n += kWidth) {
        Simd::store_pairs(to + i + 2 * n, Simd::load(x + i + n), Simd::load(x + i + stride + n));
      }
    }
    return to;
  }
}

template <typename Scalar>
CONVAI_FAST_INLINE float dot(const Scalar* x, const Scalar* y, int64_t count) {
  Simd::Float sums{};
  int64_t n = 0;
  for (; n + kWidth <= count; n += kWidth) {
    sums += Simd::load(x + n) * Simd::load(y + n);
  }
  float sum = Simd::sum(sums);
  for (; n < count; ++n) sum += simd::to_float(x[n]) * simd::to_float(y[n]);
  return sum;
}

// Products of a block's queries in rows by keys in panels, times `factor`. [rows, row.columns]
template <typename Operand>
CONVAI_FAST_INLINE void products_with_keys(const Block& block, const Operand* queries,
                                           const Operand* panels, int64_t dim, float factor,
                                           float* products, int64_t stride) {
  const int64_t words = dim / Format<Operand>::kTogether;
  for (int64_t p = 0; p < block.num_parts; ++p) {
    const Part& part = block.parts[p];
    multiply<false>(block.rows, part.count / kPanel, words, queries + block.packed() * dim, words,
                    1, panels + part.first * dim, kPanel, words * kPanel, products + part.column,
                    stride, factor);
  }
}

// out [rows, dim] = weights in rows, [rows, stride], by joined `values` [packed, dim].
template <typename Operand>
CONVAI_FAST_INLINE void sums_of_values(const Block& block, const Operand* weights, int64_t stride,
                                       const Operand* values, int64_t dim, float* out) {
  constexpr int64_t kTogether = Format<Operand>::kTogether;
  const Part& own = block.parts[block.num_parts - 1];
  multiply<false>(block.rows, dim / kPanel, own.count / kTogether, weights + own.column,
                  stride / kTogether, 1, values + own.first * dim, dim, kPanel, out, dim);
  if (block.num_parts == 1) return;
  const Part& prefix = block.parts[0];
  multiply<true>(block.rows, dim / kPanel, prefix.count / kTogether, weights + prefix.column,
                 stride / kTogether, 1, values + prefix.first * dim, dim, kPanel, out, dim);
}

// sums [packed, dim] += transposed joined weights [rows, stride] by the block's joined `queries`.
template <typename Operand>
CONVAI_FAST_INLINE void add_sums_of_queries(const Block& block, const Operand* weights,
                                            int64_t stride, const Operand* queries, int64_t dim,
                                            float* sums) {
  constexpr int64_t kTogether = Format<Operand>::kTogether;
  for (int64_t p = 0; p < block.num_parts; ++p) {
    const Part& part = block.parts[p];
    multiply<true>(part.count, dim / kPanel, block.rows / kTogether,
                   weights + part.column * kTogether, 1, stride, queries + block.packed() * dim,
                   dim, kPanel, sums + part.first * dim, dim);
  }
}

}  // namespace convai_fast::branch_attention::CONVAI_FAST_ISA
