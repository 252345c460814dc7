// How the tokens of a row are laid out, and which of them a block of queries looks at.
#pragma once

#include <algorithm>
#include <limits>

#include "ops/dropout/dropout.h"
#include "ops/heads.h"
#include "simd/vector_types.h"

namespace convai_fast::branch_attention {

using dropout::Dropout;
using simd::round_up;

constexpr int64_t kQueries = 16;  // that are computed at once
constexpr int64_t kPanel = 16;    // columns of a packed matrix that lie side by side

// Tokens of a prefix or a branch: `count` of the batch from `first`, in scratch from `packed`.
struct Segment {
  int64_t first, count, packed;
};

// The first segment is the prefix, which may be empty.
struct Row {
  const Segment* segments = nullptr;
  int64_t num_segments = 1;
  int64_t packed = 0;   // tokens in scratch
  int64_t columns = 0;  // keys that a query sees at most, padding included
};

// Scalar is float or simd::BFloat16. The backward pass alone reads grad_out and writes the other
// gradients; it reads what the forward pass writes. Each head of keys and values is that of `group`
// heads of queries.
template <typename Scalar>
struct Arguments {
  Heads<const Scalar> q, k, v;
  Heads<Scalar> out;
  float* logsumexp;  // [num_heads, tokens]
  Heads<const Scalar> grad_out;
  Heads<Scalar> grad_q, grad_k, grad_v;
  int64_t tokens, num_kv_heads, group;
  Dropout dropout;

  int64_t head_dim() const { return q.head_dim; }
  int64_t dim() const { return round_up(head_dim(), kPanel); }  // in scratch
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

  Block(const Row& row, const Segment& segment, int64_t first)
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

// A thread's memory for one row and head: arrays of the packed tokens [packed, dim], scores of a
// block of queries [kQueries, columns], and what comes of the block [kQueries, dim]. An array takes
// as many floats, or in bfloat16 rows and the same joined.
struct Scratch {
  float* memory;
  int64_t dim, row_packed, row_columns;

  static constexpr int64_t kTokenArrays = 7, kScoreArrays = 3;
  template <typename Scalar>
  Scratch(const Arguments<Scalar>& a, const Row& row, float* memory = nullptr)
      : memory(memory), dim(a.dim()), row_packed(row.packed), row_columns(row.columns) {}

  template <typename Number = float>
  Number* tokens(int64_t i) const {
    return reinterpret_cast<Number*>(memory + i * row_packed * dim);
  }
  template <typename Number = float>
  Number* scores(int64_t i) const {
    return reinterpret_cast<Number*>(tokens(kTokenArrays) + i * kQueries * row_columns);
  }
  float* block() const { return scores(kScoreArrays); }
  int64_t size() const {
    return (kTokenArrays * row_packed + kQueries) * dim + kScoreArrays * kQueries * row_columns;
  }
};

}  // namespace convai_fast::branch_attention
