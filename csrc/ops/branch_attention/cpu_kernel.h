// Attention within rows of tokens, of which each is a prefix and branches that do not see each
// other, and its gradient: no torch.
//
// A row's keys and values of one head, and the queries that look at them, are copied to scratch,
// where prefix and branches are segments that begin at a multiple of 16 and are padded with 0. A
// block of queries of a segment looks at two parts, the prefix and its own segment; products with
// both are made of full tiles, and nothing else is computed.
#include <cmath>

#include "ops/branch_attention/products.h"

namespace convai_fast::branch_attention::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;

// Calls visit(i, column, keep) for all queries i of the block and for columns in steps of kWidth,
// where `keep` has all bits set for what is not dropped. Four queries of a segment share the blocks
// of random words of a key, counted by the key's place in its segment, the first of the four
// queries, the head, and whether the key is in the query's own segment or in the prefix before it.
template <typename Visit>
CONVAI_FAST_INLINE void visit_kept(const Block& block, const Dropout& dropout, int64_t head,
                                   int64_t num_heads, const Visit& visit) {
  using Int = Simd::Int;
  for (int64_t i = 0; i < block.rows; i += 4) {
    const uint64_t query = (block.segment->first + block.first + i) * num_heads + head;
    for (int64_t p = 0; p < block.num_parts; ++p) {
      const Part& part = block.parts[p];
      const uint64_t is_prefix = p + 1 < block.num_parts;
      for (int64_t k = 0; k < part.count; k += kPanel) {
        const RandomWords random(dropout.seed, k, 2 * query + is_prefix);
#pragma GCC unroll 4
        for (int w = 0; w < 4; ++w) {
#pragma GCC unroll 4
          for (int v = 0; v < RandomWords::kVectors; ++v) {
            visit(i + w, part.column + k + v * kWidth,
                  (Int)(random.words[w][v] >= dropout.threshold));
          }
        }
      }
    }
  }
}

// Of one head of queries, by keys in panels and values in scratch.
template <typename Scalar>
CONVAI_FAST_INLINE void attend(const Arguments<Scalar>& a, const Row& row, int64_t head,
                               const Scratch& scratch, const OperandOf<Scalar>* panels,
                               const OperandOf<Scalar>* values) {
  const int64_t dim = scratch.dim, num_heads = a.num_kv_heads * a.group;
  const float factor = 1.0f / std::sqrt(static_cast<float>(a.head_dim()));
  auto* queries = scratch.tokens<OperandOf<Scalar>>(0);
  auto* operands = scratch.scores<OperandOf<Scalar>>(2);
  float *scores = scratch.scores(0), *out = scratch.block();
  pack(row, a.q, head, queries);

  for (int64_t s = 0; s < row.num_segments; ++s) {
    const Segment& segment = row.segments[s];
    for (int64_t first = 0; first < segment.count; first += kQueries) {
      const Block block(row, segment, first);
      products_with_keys(block, queries, panels, dim, factor, scores, row.columns);
      float factors[kQueries];
      for (int64_t i = 0; i < block.rows; ++i) {
        float* row_scores = scores + i * row.columns;
        block.mask(row_scores, i);
        const auto [largest, sum] = exponentiate(row_scores, block.columns);
        factors[i] = a.dropout.scale / sum;
        if (i < block.valid()) {
          a.logsumexp[head * a.tokens + segment.first + first + i] = largest + std::log(sum);
        }
      }
      if (a.dropout.threshold > 0) {
        visit_kept(block, a.dropout, head, num_heads,
                   [&](int64_t i, int64_t column, Simd::Int keep) CONVAI_FAST_INLINE_LAMBDA {
                     float* weights = scores + i * row.columns + column;
                     Simd::store(weights, Simd::where(keep, Simd::load(weights)));
                   });
      }
      const auto* weights = rounded(scores, block.rows, block.columns, row.columns, operands);
      sums_of_values(block, weights, row.columns, values, dim, out);
      for (int64_t i = 0; i < block.valid(); ++i) {
        Scalar* target = a.out.at(segment.first + first + i, head);
        for (int64_t d = 0; d < a.head_dim(); ++d)
          simd::store(out[i * dim + d] * factors[i], target + d);
      }
    }
  }
}

template <typename Scalar>
CONVAI_FAST_TARGET void forward_kernel(const Arguments<Scalar>& a, const Row& row, int64_t kv_head,
                                       float* memory) {
  const Scratch scratch(a, row, memory);
  using Operand = OperandOf<Scalar>;
  const int64_t dim = scratch.dim;
  Operand *keys = scratch.tokens<Operand>(1), *panels = scratch.tokens<Operand>(2),
          *rows = scratch.tokens<Operand>(3);
  pack(row, a.k, kv_head, keys);
  pack(row, a.v, kv_head, rows);
  transpose(keys, row.packed, dim, panels);
  const Operand* values = joined(rows, row.packed, dim, dim, rows + row.packed * dim);
  for (int64_t i = 0; i < a.group; ++i) {
    attend(a, row, kv_head * a.group + i, scratch, panels, values);
  }
}

// With weights P, dropped and scaled D, and dD = dO V^T dropped and scaled likewise:
//   dV = D^T dO,  dS = P * (dD - sum(dO * O)),  dQ = dS K scale,  dK = dS^T Q scale.
// Of one head of queries, whose share is added to the gradients of its keys and values.
template <typename Scalar>
CONVAI_FAST_INLINE void add_gradients(const Arguments<Scalar>& a, const Row& row, int64_t head,
                                      const Scratch& scratch, const OperandOf<Scalar>* keys,
                                      const OperandOf<Scalar>* key_panels,
                                      const OperandOf<Scalar>* value_panels, float factor,
                                      float* grad_keys, float* grad_values) {
  using Operand = OperandOf<Scalar>;
  using Float = Simd::Float;
  using Int = Simd::Int;
  const int64_t dim = scratch.dim, num_heads = a.num_kv_heads * a.group;
  Operand *queries = scratch.tokens<Operand>(0), *grad_out = scratch.tokens<Operand>(4);
  float *weights = scratch.scores(0), *grad_scores = scratch.scores(1);
  float* grad_queries = scratch.block();
  Operand* operands = scratch.scores<Operand>(2);
  pack(row, a.q, head, queries);
  pack(row, a.grad_out, head, grad_out);
  const int64_t packed = row.packed * dim;
  const Operand* joined_queries = joined(queries, row.packed, dim, dim, queries + packed);
  const Operand* joined_grad_out = joined(grad_out, row.packed, dim, dim, grad_out + packed);

  for (int64_t s = 0; s < row.num_segments; ++s) {
    const Segment& segment = row.segments[s];
    for (int64_t first = 0; first < segment.count; first += kQueries) {
      const Block block(row, segment, first);
      products_with_keys(block, queries, key_panels, dim, factor, weights, row.columns);
      products_with_keys(block, grad_out, value_panels, dim, a.dropout.scale, grad_scores,
                         row.columns);
      float logsumexp[kQueries] = {}, deltas[kQueries] = {};
      for (int64_t i = 0; i < block.rows; ++i) {
        block.mask(weights + i * row.columns, i);
        if (i >= block.valid()) continue;
        const int64_t token = segment.first + first + i;
        logsumexp[i] = a.logsumexp[head * a.tokens + token];
        deltas[i] = dot(a.grad_out.at(token, head), a.out.at(token, head), a.head_dim());
      }
      const auto finish = [&](int64_t i, int64_t column, Int keep) CONVAI_FAST_INLINE_LAMBDA {
        float* weight = weights + i * row.columns + column;
        float* grad = grad_scores + i * row.columns + column;
        const Float p = Simd::exp(Simd::load(weight) - logsumexp[i]);
        const Float kept = Simd::where(keep, Simd::load(grad));
        Simd::store(weight, Simd::where(keep, p));
        Simd::store(grad, p * (kept - deltas[i]));
      };
      if (a.dropout.threshold > 0) {
        visit_kept(block, a.dropout, head, num_heads, finish);
      } else {
        for (int64_t i = 0; i < block.rows; ++i) {
          for (int64_t j = 0; j < block.columns; j += kWidth) finish(i, j, ~Int{});
        }
      }
      const auto joined_scores = [&](const float* x) CONVAI_FAST_INLINE_LAMBDA {
        return joined(x, block.rows, block.columns, row.columns, operands);
      };
      add_sums_of_queries(block, joined_scores(weights), row.columns, joined_grad_out, dim,
                          grad_values);
      add_sums_of_queries(block, joined_scores(grad_scores), row.columns, joined_queries, dim,
                          grad_keys);
      const auto* rows = rounded(grad_scores, block.rows, block.columns, row.columns, operands);
      sums_of_values(block, rows, row.columns, keys, dim, grad_queries);
      for (int64_t i = 0; i < block.valid(); ++i) {
        Scalar* grad = a.grad_q.at(segment.first + first + i, head);
        for (int64_t d = 0; d < a.head_dim(); ++d)
          simd::store(grad_queries[i * dim + d] * factor, grad + d);
      }
    }
  }
}

template <typename Scalar>
CONVAI_FAST_TARGET void backward_kernel(const Arguments<Scalar>& a, const Row& row, int64_t kv_head,
                                        float* memory) {
  const Scratch scratch(a, row, memory);
  const int64_t dim = scratch.dim, packed = row.packed * dim;
  const float factor = 1.0f / std::sqrt(static_cast<float>(a.head_dim()));
  using Operand = OperandOf<Scalar>;
  Operand *rows = scratch.tokens<Operand>(1), *key_panels = scratch.tokens<Operand>(2);
  Operand* value_panels = scratch.tokens<Operand>(3);
  float *grad_keys = scratch.tokens(5), *grad_values = scratch.tokens(6);
  pack(row, a.v, kv_head, rows);
  transpose(rows, row.packed, dim, value_panels);
  pack(row, a.k, kv_head, rows);
  transpose(rows, row.packed, dim, key_panels);
  const Operand* keys = joined(rows, row.packed, dim, dim, rows + packed);
  std::fill_n(grad_keys, packed, 0.0f);
  std::fill_n(grad_values, packed, 0.0f);
  for (int64_t i = 0; i < a.group; ++i) {
    add_gradients(a, row, kv_head * a.group + i, scratch, keys, key_panels, value_panels, factor,
                  grad_keys, grad_values);
  }
  unpack(row, grad_keys, factor, kv_head, a.grad_k);
  unpack(row, grad_values, a.dropout.scale, kv_head, a.grad_v);
}

}  // namespace convai_fast::branch_attention::CONVAI_FAST_ISA
