// Attention within rows of tokens, of which each is a prefix and branches that do not see each
// other, and its gradient: no torch.
//
// A row's queries, keys and values of one head are copied to scratch, where prefix and branches are
// segments that begin at a multiple of 16 and are padded with 0. A block of queries of a segment
// looks at two parts, the prefix and its own segment; products with both are made of full tiles,
// and nothing else is computed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "ops/dropout/cpu_kernel.h"
#include "simd/tile.h"

namespace convai_fast {

constexpr int64_t kQueries = 16;  // that are computed at once

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Tokens of a prefix or a branch: `count` of the batch from `first`, in scratch from `packed`.
struct Segment {
  int64_t first, count, packed;
};

// The first segment is the prefix, which may be empty.
struct BranchRow {
  const Segment* segments;
  int64_t num_segments;
  int64_t packed;   // tokens in scratch
  int64_t columns;  // keys that a query sees at most, padding included
};

// Scalar is float or BFloat16. The backward pass alone reads grad_out and writes grad_qkv; it reads
// what the forward pass writes.
template <typename Scalar>
struct BranchAttentionArguments {
  const Scalar* qkv;  // [tokens, 3, num_heads, head_dim]
  Scalar* out;        // [tokens, num_heads, head_dim]
  float* logsumexp;   // [num_heads, tokens]
  const Scalar* grad_out;
  Scalar* grad_qkv;
  int64_t tokens, num_heads, head_dim;
  Dropout dropout;

  int64_t dim() const { return round_up(head_dim, kPanel); }  // in scratch
};

// Keys that a block of queries looks at: packed [first, first + count), count a multiple of 16, in
// columns [column, column + count) of its scores.
struct Part {
  int64_t first, count, column;
};

struct Block {
  const Segment* segment;
  int64_t first, rows;  // queries of the segment; rows is a multiple of 8 and may reach beyond it
  int64_t columns, num_parts;
  Part parts[2];  // its own segment last

  Block(const BranchRow& row, const Segment& segment, int64_t first)
      : segment(&segment),
        first(first),
        rows(std::min(kQueries, round_up(segment.count - first, 8))),
        columns(0),
        num_parts(0) {
    const Segment& prefix = row.segments[0];
    if (&segment != &prefix) add(prefix.packed, round_up(prefix.count, kPanel));
    prefix_count = columns == 0 ? 0 : prefix.count;
    add(segment.packed, round_up(first + rows, kPanel));
  }

  int64_t packed() const { return segment->packed + first; }
  int64_t valid() const { return std::min(rows, segment->count - first); }

  // Sets the columns that query i does not see: padding, and tokens after it.
  void mask(float* scores, int64_t i) const {
    constexpr float kHidden = -std::numeric_limits<float>::infinity();
    const int64_t own = parts[num_parts - 1].column;
    std::fill(scores + prefix_count, scores + own, kHidden);
    std::fill(scores + own + first + i + 1, scores + columns, kHidden);
  }

 private:
  int64_t prefix_count;  // tokens of the prefix where it is a part of its own

  void add(int64_t first, int64_t count) {
    if (count == 0) return;
    parts[num_parts++] = {first, count, columns};
    columns += count;
  }
};

// out[m][n] (+)= sum over k < depth of x[m * x_row + k * x_step] * weight[k][n], where the 16
// weights of k are at k * stride and those of the next panel panel_stride further on. The number of
// rows is a multiple of 8.
template <int kWidth, bool kAccumulate>
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
      tile.add_products(x + m * x_row, x_row, weight + panel * panel_stride, stride, panel_stride,
                        0, depth, x_step);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) tile.store_row(i, target + i * out_stride);
    }
  };
  int64_t panel = 0;
  for (; panel + kPanels <= panels; panel += kPanels) {
    tiles(Tile<kWidth, kRows, kPanels>{}, panel);
  }
  for (; panel < panels; ++panel) tiles(Tile<kWidth, kRows, 1>{}, panel);
}

// Copies a head's queries (part 0), keys (1) or values (2), or, with a stride of one part, outputs.
template <int kWidth, typename Scalar>
CONVAI_FAST_INLINE void pack(const BranchRow& row, const Scalar* source, int64_t stride,
                             int64_t head_dim, float* packed) {
  const int64_t dim = round_up(head_dim, kPanel);
  for (int64_t s = 0; s < row.num_segments; ++s) {
    const Segment& segment = row.segments[s];
    float* target = packed + segment.packed * dim;
    for (int64_t i = 0; i < segment.count; ++i, target += dim) {
      const Scalar* token = source + (segment.first + i) * stride;
      int64_t d = 0;
      for (; d + kWidth <= head_dim; d += kWidth) {
        Simd<kWidth>::store(target + d, load_weights<kWidth>(token + d));
      }
      Scalar edge[kWidth] = {};
      std::copy_n(token + d, head_dim - d, edge);
      for (; d < dim; d += kWidth) {
        Simd<kWidth>::store(target + d, load_weights<kWidth>(edge));
        std::fill_n(edge, kWidth, Scalar{});
      }
    }
    std::fill_n(target, (round_up(segment.count, kPanel) - segment.count) * dim, 0.0f);
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

template <int kWidth, typename Scalar>
CONVAI_FAST_INLINE float dot(const float* x, const Scalar* y, int64_t count) {
  typename Simd<kWidth>::Float sums{};
  int64_t n = 0;
  for (; n + kWidth <= count; n += kWidth) {
    sums += Simd<kWidth>::load(x + n) * load_weights<kWidth>(y + n);
  }
  float sum = Simd<kWidth>::sum(sums);
  for (; n < count; ++n) sum += x[n] * to_float(y[n]);
  return sum;
}

template <int kWidth>
CONVAI_FAST_INLINE void scale(float* x, int64_t count, float factor) {
  for (int64_t n = 0; n < count; n += kWidth) {
    Simd<kWidth>::store(x + n, Simd<kWidth>::load(x + n) * factor);
  }
}

// Calls visit(i, column, keep) for all queries i of the block and for columns in steps of kWidth,
// where `keep` has all bits set for what is not dropped. Four queries of a segment share the blocks
// of random words of a key, counted by the key's place in its segment, the first of the four
// queries, the head, and whether the key is in the query's own segment or in the prefix before it.
template <int kWidth, typename Visit>
CONVAI_FAST_INLINE void visit_kept(const Block& block, const Dropout& dropout, int64_t head,
                                   int64_t num_heads, const Visit& visit) {
  using Int = typename Simd<kWidth>::Int;
  using Random = RandomWords<kWidth>;
  for (int64_t i = 0; i < block.rows; i += 4) {
    const uint64_t query = (block.segment->first + block.first + i) * num_heads + head;
    for (int64_t p = 0; p < block.num_parts; ++p) {
      const Part& part = block.parts[p];
      const uint64_t is_prefix = p + 1 < block.num_parts;
      for (int64_t k = 0; k < part.count; k += kPanel) {
        const Random random(dropout.seed, k, 2 * query + is_prefix);
#pragma GCC unroll 4
        for (int w = 0; w < 4; ++w) {
#pragma GCC unroll 4
          for (int v = 0; v < Random::kVectors; ++v) {
            visit(i + w, part.column + k + v * kWidth,
                  (Int)(random.words[w][v] >= dropout.threshold));
          }
        }
      }
    }
  }
}

// Scores of a block: queries that are scaled by keys in panels. [rows, row.columns]
template <int kWidth>
CONVAI_FAST_INLINE void products_with_keys(const Block& block, const float* queries,
                                           const float* panels, int64_t dim, float* products,
                                           int64_t stride) {
  for (int64_t p = 0; p < block.num_parts; ++p) {
    const Part& part = block.parts[p];
    multiply<kWidth, false>(block.rows, part.count / kPanel, dim, queries + block.packed() * dim,
                            dim, 1, panels + part.first * dim, kPanel, dim * kPanel,
                            products + part.column, stride);
  }
}

// out [rows, dim] = weights [rows, stride] by rows of `values` [packed, dim].
template <int kWidth>
CONVAI_FAST_INLINE void sums_of_values(const Block& block, const float* weights, int64_t stride,
                                       const float* values, int64_t dim, float* out) {
  const Part& own = block.parts[block.num_parts - 1];
  multiply<kWidth, false>(block.rows, dim / kPanel, own.count, weights + own.column, stride, 1,
                          values + own.first * dim, dim, kPanel, out, dim);
  if (block.num_parts == 1) return;
  const Part& prefix = block.parts[0];
  multiply<kWidth, true>(block.rows, dim / kPanel, prefix.count, weights + prefix.column, stride, 1,
                         values + prefix.first * dim, dim, kPanel, out, dim);
}

// sums [packed, dim] += transposed weights [rows, stride] by the block's rows of `queries`.
template <int kWidth>
CONVAI_FAST_INLINE void add_sums_of_queries(const Block& block, const float* weights,
                                            int64_t stride, const float* queries, int64_t dim,
                                            float* sums) {
  for (int64_t p = 0; p < block.num_parts; ++p) {
    const Part& part = block.parts[p];
    multiply<kWidth, true>(part.count, dim / kPanel, block.rows, weights + part.column, 1, stride,
                           queries + block.packed() * dim, dim, kPanel, sums + part.first * dim,
                           dim);
  }
}

// A row's number of floats in scratch; the forward pass needs fewer.
template <typename Scalar>
int64_t branch_attention_scratch(const BranchAttentionArguments<Scalar>& a, const BranchRow& row) {
  return (7 * row.packed + kQueries) * a.dim() + 2 * kQueries * row.columns;
}

template <int kWidth, typename Scalar>
CONVAI_FAST_INLINE void forward_body(const BranchAttentionArguments<Scalar>& a,
                                     const BranchRow& row, int64_t head, float* scratch) {
  using S = Simd<kWidth>;
  const int64_t dim = a.dim(), width = a.num_heads * a.head_dim, packed = row.packed * dim;
  float* queries = scratch;
  float* keys = queries + packed;
  float* panels = keys + packed;
  float* values = panels + packed;
  float* scores = values + packed;
  float* out = scores + kQueries * row.columns;
  const Scalar* source = a.qkv + head * a.head_dim;
  pack<kWidth>(row, source, 3 * width, a.head_dim, queries);
  pack<kWidth>(row, source + width, 3 * width, a.head_dim, keys);
  pack<kWidth>(row, source + 2 * width, 3 * width, a.head_dim, values);
  scale<kWidth>(queries, packed, 1.0f / std::sqrt(static_cast<float>(a.head_dim)));
  transpose(keys, row.packed, dim, panels);

  for (int64_t s = 0; s < row.num_segments; ++s) {
    const Segment& segment = row.segments[s];
    for (int64_t first = 0; first < segment.count; first += kQueries) {
      const Block block(row, segment, first);
      products_with_keys<kWidth>(block, queries, panels, dim, scores, row.columns);
      float factors[kQueries];
      for (int64_t i = 0; i < block.rows; ++i) {
        float* row_scores = scores + i * row.columns;
        block.mask(row_scores, i);
        auto largest = S::load(row_scores);
        for (int64_t j = kWidth; j < block.columns; j += kWidth) {
          largest = S::max(largest, S::load(row_scores + j));
        }
        const float row_largest = S::max(largest);
        typename S::Float sums{};
        for (int64_t j = 0; j < block.columns; j += kWidth) {
          const auto weight = S::exp(S::load(row_scores + j) - row_largest);
          S::store(row_scores + j, weight);
          sums += weight;
        }
        const float sum = S::sum(sums);
        factors[i] = a.dropout.scale / sum;
        if (i < block.valid()) {
          a.logsumexp[head * a.tokens + segment.first + first + i] = row_largest + std::log(sum);
        }
      }
      if (a.dropout.threshold > 0) {
        visit_kept<kWidth>(
            block, a.dropout, head, a.num_heads,
            [&](int64_t i, int64_t column, typename S::Int keep) CONVAI_FAST_INLINE_LAMBDA {
              float* weights = scores + i * row.columns + column;
              S::store(weights, (typename S::Float)((typename S::Int)S::load(weights) & keep));
            });
      }
      sums_of_values<kWidth>(block, scores, row.columns, values, dim, out);
      for (int64_t i = 0; i < block.valid(); ++i) {
        Scalar* target = a.out + (segment.first + first + i) * width + head * a.head_dim;
        for (int64_t d = 0; d < a.head_dim; ++d) store(out[i * dim + d] * factors[i], target + d);
      }
    }
  }
}

template <typename Scalar>
CONVAI_FAST_INLINE void unpack(const BranchRow& row, const float* packed, float factor,
                               int64_t stride, int64_t head_dim, Scalar* target) {
  const int64_t dim = round_up(head_dim, kPanel);
  for (int64_t s = 0; s < row.num_segments; ++s) {
    const Segment& segment = row.segments[s];
    for (int64_t i = 0; i < segment.count; ++i) {
      for (int64_t d = 0; d < head_dim; ++d) {
        store(packed[(segment.packed + i) * dim + d] * factor,
              target + (segment.first + i) * stride + d);
      }
    }
  }
}

// With weights P, dropped and scaled D, and dD = dO V^T dropped and scaled likewise:
//   dV = D^T dO,  dS = P * (dD - sum(dO * O)),  dQ = dS K scale,  dK = dS^T Q scale.
template <int kWidth, typename Scalar>
CONVAI_FAST_INLINE void backward_body(const BranchAttentionArguments<Scalar>& a,
                                      const BranchRow& row, int64_t head, float* scratch) {
  using S = Simd<kWidth>;
  using Float = typename S::Float;
  using Int = typename S::Int;
  const int64_t dim = a.dim(), width = a.num_heads * a.head_dim, packed = row.packed * dim;
  float* queries = scratch;
  float* keys = queries + packed;
  float* key_panels = keys + packed;
  float* value_panels = key_panels + packed;
  float* grad_out = value_panels + packed;
  float* grad_keys = grad_out + packed;
  float* grad_values = grad_keys + packed;
  float* weights = grad_values + packed;
  float* grad_scores = weights + kQueries * row.columns;
  float* grad_queries = grad_scores + kQueries * row.columns;
  const float factor = 1.0f / std::sqrt(static_cast<float>(a.head_dim));
  const Scalar* source = a.qkv + head * a.head_dim;
  Scalar* target = a.grad_qkv + head * a.head_dim;
  pack<kWidth>(row, source, 3 * width, a.head_dim, queries);
  pack<kWidth>(row, source + width, 3 * width, a.head_dim, keys);
  pack<kWidth>(row, source + 2 * width, 3 * width, a.head_dim, grad_values);
  pack<kWidth>(row, a.grad_out + head * a.head_dim, width, a.head_dim, grad_out);
  scale<kWidth>(queries, packed, factor);
  transpose(keys, row.packed, dim, key_panels);
  transpose(grad_values, row.packed, dim, value_panels);
  std::fill_n(grad_keys, 2 * packed, 0.0f);

  for (int64_t s = 0; s < row.num_segments; ++s) {
    const Segment& segment = row.segments[s];
    for (int64_t first = 0; first < segment.count; first += kQueries) {
      const Block block(row, segment, first);
      products_with_keys<kWidth>(block, queries, key_panels, dim, weights, row.columns);
      products_with_keys<kWidth>(block, grad_out, value_panels, dim, grad_scores, row.columns);
      float logsumexp[kQueries] = {}, deltas[kQueries] = {};
      for (int64_t i = 0; i < block.rows; ++i) {
        block.mask(weights + i * row.columns, i);
        if (i >= block.valid()) continue;
        const int64_t token = segment.first + first + i;
        logsumexp[i] = a.logsumexp[head * a.tokens + token];
        const Scalar* out = a.out + token * width + head * a.head_dim;
        deltas[i] = dot<kWidth>(grad_out + (block.packed() + i) * dim, out, a.head_dim);
      }
      const auto finish = [&](int64_t i, int64_t column, Int keep) CONVAI_FAST_INLINE_LAMBDA {
        float* weight = weights + i * row.columns + column;
        float* grad = grad_scores + i * row.columns + column;
        const Float p = S::exp(S::load(weight) - logsumexp[i]);
        const Float kept = (Float)((Int)(S::load(grad) * a.dropout.scale) & keep);
        S::store(weight, (Float)((Int)p & keep));
        S::store(grad, p * (kept - deltas[i]));
      };
      if (a.dropout.threshold > 0) {
        visit_kept<kWidth>(block, a.dropout, head, a.num_heads, finish);
      } else {
        for (int64_t i = 0; i < block.rows; ++i) {
          for (int64_t j = 0; j < block.columns; j += kWidth) finish(i, j, ~Int{});
        }
      }
      add_sums_of_queries<kWidth>(block, weights, row.columns, grad_out, dim, grad_values);
      add_sums_of_queries<kWidth>(block, grad_scores, row.columns, queries, dim, grad_keys);
      sums_of_values<kWidth>(block, grad_scores, row.columns, keys, dim, grad_queries);
      for (int64_t i = 0; i < block.valid(); ++i) {
        Scalar* grad = target + (segment.first + first + i) * 3 * width;
        for (int64_t d = 0; d < a.head_dim; ++d)
          store(grad_queries[i * dim + d] * factor, grad + d);
      }
    }
  }
  unpack(row, grad_keys, 1.0f, 3 * width, a.head_dim, target + width);
  unpack(row, grad_values, a.dropout.scale, 3 * width, a.head_dim, target + 2 * width);
}

template <typename Scalar>
using BranchAttention = void (*)(const BranchAttentionArguments<Scalar>&, const BranchRow&,
                                 int64_t head, float* scratch);

#define CONVAI_FAST_BRANCH_ATTENTION(isa, target, width)                                   \
  template <typename Scalar>                                                               \
  target void branch_attention_##isa(const BranchAttentionArguments<Scalar>& a,            \
                                     const BranchRow& row, int64_t head, float* scratch) { \
    forward_body<width>(a, row, head, scratch);                                            \
  }                                                                                        \
  template <typename Scalar>                                                               \
  target void branch_attention_backward_##isa(const BranchAttentionArguments<Scalar>& a,   \
                                              const BranchRow& row, int64_t head,          \
                                              float* scratch) {                            \
    backward_body<width>(a, row, head, scratch);                                           \
  }
#if CONVAI_FAST_X86
CONVAI_FAST_BRANCH_ATTENTION(avx512, CONVAI_FAST_AVX512, 16)
CONVAI_FAST_BRANCH_ATTENTION(avx2, CONVAI_FAST_AVX2, 8)
#endif
CONVAI_FAST_BRANCH_ATTENTION(portable, , 4)
#undef CONVAI_FAST_BRANCH_ATTENTION

template <typename Scalar>
BranchAttention<Scalar> branch_attention_for(Isa isa, bool backward) {
#if CONVAI_FAST_X86
  if (isa == Isa::kAvx512) {
    return backward ? branch_attention_backward_avx512<Scalar> : branch_attention_avx512<Scalar>;
  }
  if (isa == Isa::kAvx2) {
    return backward ? branch_attention_backward_avx2<Scalar> : branch_attention_avx2<Scalar>;
  }
#endif
  return backward ? branch_attention_backward_portable<Scalar> : branch_attention_portable<Scalar>;
}

}  // namespace convai_fast
