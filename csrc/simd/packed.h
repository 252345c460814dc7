// Matrices that are multiplied from the right, [features, columns], as they lie in memory: in
// blocks of 64 columns. In a block the 64 values of a feature lie side by side; of bfloat16 pairs
// of features are innermost, of int8 fours of them, as the processors' instructions add them up:
//
//   float32   [blocks, features, 64]
//   bfloat16  [blocks, ceil(features / 2), 64, 2]
//   int8      [blocks, ceil(features / 4), 64, 4]
//
// padded with 0. So with 3 features, column n of a block of bfloat16 is
//
//   w[0, n, 0] w[0, n, 1]   features 0 and 1
//   w[1, n, 0] 0            feature 2 and the padding
#pragma once

#include <cstdint>

#include "simd/half.h"
#include "simd/vector_types.h"

namespace convai_fast::simd {

constexpr int64_t kBlock = 64;     // columns
constexpr int64_t kMostRows = 64;  // that are multiplied by a block at a time

// For each format: what is multiplied by it, what products are summed in, and how many features lie
// together.
template <typename Scalar>
struct Format;

template <>
struct Format<float> {
  using Activation = float;
  using Sum = float;
  static constexpr int64_t kTogether = 1;
};

template <>
struct Format<BFloat16> {
  using Activation = BFloat16;
  using Sum = float;
  static constexpr int64_t kTogether = 2;
};

template <>
struct Format<int8_t> {
  using Activation = uint8_t;
  using Sum = int32_t;
  static constexpr int64_t kTogether = 4;
};

// A sum is made in the order of the features within a part of them, and part is added to
// part. So the part of a block that is read again for every few rows stays in the second-level
// cache, and a row's result is the same bits whatever stands beside it and whoever multiplies.
template <typename Scalar>
constexpr int64_t features_of_part() {
  constexpr int64_t kPartBytes = 192 << 10;
  return kPartBytes / (kBlock * sizeof(Scalar));
}

}  // namespace convai_fast::simd
