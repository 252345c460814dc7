// The matrix products of a block of queries, and the packed arrays that they are made of.
#include "ops/branch_attention/rows.h"
#include "ops/branch_attention/tile.h"

namespace convai_fast::branch_attention::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;

// out[m][n] (+)= sum over k < depth of x[m * x_row + k * x_step] * weight[k][n], where the 16
// weights of k are at k * stride and those of the next panel panel_stride further on. The number of
// rows is a multiple of 8.
template <bool kAccumulate>
CONVAI_FAST_INLINE void multiply(int64_t rows, int64_t panels, int64_t depth, const float* x,
                                 int64_t x_row, int64_t x_step, const float* weight, int64_t stride,
                                 int64_t panel_stride, float* out, int64_t out_stride) {
  constexpr int kRows = kWidth == 16 ? 8 : kWidth == 8 ? 4 : 2;
  constexpr int kPanels = kWidth == 16 ? 2 : 1;
  const auto tiles = [&](auto tile, int64_t panel) CONVAI_FAST_INLINE_LAMBDA {
    for (int64_t m = 0; m < rows; m += kRows) {
      float* target = out + m * out_stride + panel * kPanel;
      tile.clear();
      if constexpr (kAccumulate) {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) tile.load_row(i, target + i * out_stride);
      }
      tile.add_products(x + m * x_row, x_row, x_step, weight + panel * panel_stride, stride,
                        panel_stride, depth);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) tile.store_row(i, target + i * out_stride);
    }
  };
  int64_t panel = 0;
  for (; panel + kPanels <= panels; panel += kPanels) {
    tiles(Tile<kRows, kPanels>{}, panel);
  }
  for (; panel < panels; ++panel) tiles(Tile<kRows, 1>{}, panel);
}

// Copies a head of a row's tokens.
template <typename Scalar>
CONVAI_FAST_INLINE void pack(const Row& row, const Heads<const Scalar>& source, int64_t head,
                             float* packed) {
  const int64_t head_dim = source.head_dim, dim = round_up(head_dim, kPanel);
  for (int64_t s = 0; s < row.num_segments; ++s) {
    const Segment& segment = row.segments[s];
    float* target = packed + segment.packed * dim;
    for (int64_t i = 0; i < segment.count; ++i, target += dim) {
      const Scalar* token = source.at(segment.first + i, head);
      int64_t d = 0;
      for (; d + kWidth <= head_dim; d += kWidth) {
        Simd::store(target + d, Simd::load(token + d));
      }
      Scalar edge[kWidth] = {};
      std::copy_n(token + d, head_dim - d, edge);
      for (; d < dim; d += kWidth) {
        Simd::store(target + d, Simd::load(edge));
        std::fill_n(edge, kWidth, Scalar{});
      }
    }
    std::fill_n(target, (round_up(segment.count, kPanel) - segment.count) * dim, 0.0f);
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

// [tokens, dim] to panels [tokens / 16, dim, 16].
CONVAI_FAST_INLINE void transpose(const float* packed, int64_t tokens, int64_t dim, float* panels) {
  for (int64_t first = 0; first < tokens; first += kPanel) {
    const float* source = packed + first * dim;
    for (int64_t d = 0; d < dim; ++d, panels += kPanel) {
      for (int64_t i = 0; i < kPanel; ++i) panels[i] = source[i * dim + d];
    }
  }
}

template <typename Scalar>
CONVAI_FAST_INLINE float dot(const float* x, const Scalar* y, int64_t count) {
  Simd::Float sums{};
  int64_t n = 0;
  for (; n + kWidth <= count; n += kWidth) {
    sums += Simd::load(x + n) * Simd::load(y + n);
  }
  float sum = Simd::sum(sums);
  for (; n < count; ++n) sum += x[n] * simd::to_float(y[n]);
  return sum;
}

CONVAI_FAST_INLINE void scale(float* x, int64_t count, float factor) {
  for (int64_t n = 0; n < count; n += kWidth) {
    Simd::store(x + n, Simd::load(x + n) * factor);
  }
}

// Scores of a block: queries that are scaled by keys in panels. [rows, row.columns]
CONVAI_FAST_INLINE void products_with_keys(const Block& block, const float* queries,
                                           const float* panels, int64_t dim, float* products,
                                           int64_t stride) {
  for (int64_t p = 0; p < block.num_parts; ++p) {
    const Part& part = block.parts[p];
    multiply<false>(block.rows, part.count / kPanel, dim, queries + block.packed() * dim, dim, 1,
                    panels + part.first * dim, kPanel, dim * kPanel, products + part.column,
                    stride);
  }
}

// out [rows, dim] = weights [rows, stride] by rows of `values` [packed, dim].
CONVAI_FAST_INLINE void sums_of_values(const Block& block, const float* weights, int64_t stride,
                                       const float* values, int64_t dim, float* out) {
  const Part& own = block.parts[block.num_parts - 1];
  multiply<false>(block.rows, dim / kPanel, own.count, weights + own.column, stride, 1,
                  values + own.first * dim, dim, kPanel, out, dim);
  if (block.num_parts == 1) return;
  const Part& prefix = block.parts[0];
  multiply<true>(block.rows, dim / kPanel, prefix.count, weights + prefix.column, stride, 1,
                 values + prefix.first * dim, dim, kPanel, out, dim);
}

// sums [packed, dim] += transposed weights [rows, stride] by the block's rows of `queries`.
CONVAI_FAST_INLINE void add_sums_of_queries(const Block& block, const float* weights,
                                            int64_t stride, const float* queries, int64_t dim,
                                            float* sums) {
  for (int64_t p = 0; p < block.num_parts; ++p) {
    const Part& part = block.parts[p];
    multiply<true>(part.count, dim / kPanel, block.rows, weights + part.column, 1, stride,
                   queries + block.packed() * dim, dim, kPanel, sums + part.first * dim, dim);
  }
}

}  // namespace convai_fast::branch_attention::CONVAI_FAST_ISA
