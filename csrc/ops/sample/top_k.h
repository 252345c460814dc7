// Top-k: what is kept is found among few tokens, without a sort of the row.
#pragma once

#include "ops/sample/weighed_row.h"

namespace convai_fast::sample {

// What the k largest tempered logits, and not many more, reach in all likelihood: for few of
// them surely, since k blocks have a maximum that reaches the k-th largest maximum.
inline float bound_of_largest(const WeighedRow& row, int64_t k) {
  float* ordered = row.scratch().inside();
  int64_t size = num_blocks(row.vocab_size()), rank = k - 1;
  if (k <= size / 2) {
    std::copy_n(row.scratch().maxima(), size, ordered);
  } else {
    size = row.take_sample(ordered);
    const double expected = static_cast<double>(k) * kTaken / kStride;
    rank = static_cast<int64_t>(expected + 4 * std::sqrt(expected) + 4);
    if (rank >= size) return kNever;
  }
  std::nth_element(ordered, ordered + rank, ordered + size, std::greater<>());
  return row.row().tempered(ordered[rank]);
}

// Lists the k largest, and what ties with the last of them.
inline int64_t collect_largest(const WeighedRow& row, int64_t k) {
  int64_t count = row.collect(bound_of_largest(row, k));
  if (count < k) count = row.collect(kNever);
  const List kept = row.scratch().kept();
  float* ordered = row.scratch().inside();  // not in use yet
  std::copy_n(kept.values, count, ordered);
  std::nth_element(ordered, ordered + k - 1, ordered + count, std::greater<>());
  const float kth_largest = ordered[k - 1];
  int64_t num_kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float z = kept.values[i];
    kept.values[num_kept] = z;
    kept.places[num_kept] = kept.places[i];
    num_kept += z >= kth_largest;
  }
  return num_kept;
}

}  // namespace convai_fast::sample
