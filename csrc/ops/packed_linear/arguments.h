// The weight of `packed_linear`, what a product is given, and how both lie in memory.
//
// W [out_features, in_features] is packed in blocks of 64 output features. In a block, the 64
// weights of an input feature lie side by side; of bfloat16 pairs of input features are innermost,
// of int8 fours of them, as the processors' instructions add them up:
//
//   float32   [blocks, in_features, 64]
//   bfloat16  [blocks, ceil(in_features / 2), 64, 2]
//   int8      [blocks, ceil(in_features / 4), 64, 4]
//
// padded with 0. So with 3 input features, output feature n of a block of bfloat16 is
//
//   w[0, n, 0] w[0, n, 1]   input features 0 and 1
//   w[1, n, 0] 0            input feature 2 and the padding
//
// x is rounded to the weight's format, once for all blocks. For int8 weights every row of it gets
// a scale and a zero of its own: x = (u - zero) * scale with u from 0 to 255. Then
//
//   sum of x W = scale * scale of W * (sum of u W - zero * sum of W)
//
// where the sums of W, one for each output feature, are known from packing: all that is summed are
// whole numbers, exactly, by any instructions.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd/half.h"
#include "simd/vector_types.h"

namespace convai_fast::packed_linear {

constexpr int64_t kBlock = 64;     // output features
constexpr int64_t kMostRows = 64;  // that are multiplied by a block at a time

// For each format of the weight: what x is rounded to, what products are summed in, and how many
// input features lie together.
template <typename Scalar>
struct Format;

template <>
struct Format<float> {
  using Activation = float;
  using Sum = float;
  static constexpr int64_t kTogether = 1;
};

template <>
struct Format<simd::BFloat16> {
  using Activation = simd::BFloat16;
  using Sum = float;
  static constexpr int64_t kTogether = 2;
};

template <>
struct Format<int8_t> {
  using Activation = uint8_t;
  using Sum = int32_t;
  static constexpr int64_t kTogether = 4;
};

// A sum is made in the order of the input features within a part of them, and part is added to
// part. So the part of a block that is read again for every few rows stays in the second-level
// cache, and a row's result is the same bits whatever stands beside it and whoever multiplies.
template <typename Scalar>
constexpr int64_t features_of_part() {
  constexpr int64_t kPartBytes = 192 << 10;
  return kPartBytes / (kBlock * sizeof(Scalar));
}

// The most input features whose products with int8 weights int32 holds: 255 * 127 * 66,311 < 2^31.
constexpr int64_t kMostInt8Features = 66'311;

template <typename Scalar>
struct Weight {
  const Scalar* data;
  const float* scales;         // [out_features], of int8
  const int32_t* column_sums;  // [out_features], of int8: the sum of an output feature's weights
  const float* bias;           // [out_features] or null
  int64_t in_features, out_features;

  int64_t blocks() const { return simd::round_up(out_features, kBlock) / kBlock; }
  int64_t padded_features() const { return simd::round_up(in_features, Format<Scalar>::kTogether); }
  const Scalar* block(int64_t i) const { return data + i * padded_features() * kBlock; }
};

// Some rows of x in the weight's format, `stride` apart.
template <typename Scalar>
struct Rows {
  const typename Format<Scalar>::Activation* data;
  int64_t stride;
  const float* scales;   // [rows], for int8
  const int32_t* zeros;  // [rows], for int8

  Rows from(int64_t row) const { return {data + row * stride, stride, scales + row, zeros + row}; }
};

// Where results go, float32 [rows, out_features], and what is done to them on the way.
struct Results {
  float* data;
  int64_t stride;
  bool gelu;              // the tanh approximation of GELU
  const float* residual;  // added at the end, of the same shape and stride, or null; may be data

  Results from(int64_t row) const {
    return {data + row * stride, stride, gelu, residual ? residual + row * stride : nullptr};
  }
};

}  // namespace convai_fast::packed_linear
