// The weight of `packed_linear`, what a product is given, and how both lie in memory.
//
// W [out_features, in_features] is packed as simd/packed.h has it, an output feature a column. x is
// rounded to the weight's format, once for all blocks. For int8 weights every row of it gets
// a scale and a zero of its own: x = (u - zero) * scale with u from 0 to 255. Then
//
//   sum of x W = scale * scale of W * (sum of u W - zero * sum of W)
//
// where the sums of W, one for each output feature, are known from packing: all that is summed are
// whole numbers, exactly, by any instructions.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd/packed.h"

namespace convai_fast::packed_linear {

using simd::Format;
using simd::kBlock;
using simd::kMostRows;

// The most input features whose products with int8 weights int32 holds: 255 * 128 * 65,793 < 2^31.
constexpr int64_t kMostInt8Features = 65'793;

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

  // That of layer `i`, of a stack of which this is the first; null where this one is.
  Weight of_layer(int64_t i) const {
    const int64_t offset = i * out_features;
    return {data ? block(i * blocks()) : nullptr,
            scales ? scales + offset : nullptr,
            column_sums ? column_sums + offset : nullptr,
            bias ? bias + offset : nullptr,
            in_features,
            out_features};
  }
};

// Some rows of x in the weight's format, `stride` apart.
template <typename Scalar>
struct Rows {
  const typename Format<Scalar>::Activation* data;
  int64_t stride;
  const float* scales = nullptr;   // [rows], for int8
  const int32_t* zeros = nullptr;  // [rows], for int8

  Rows from(int64_t row) const {
    return {data + row * stride, stride, scales ? scales + row : nullptr,
            zeros ? zeros + row : nullptr};
  }
};

// A norm over a row of x, before it is rounded: LayerNorm (Ba et al. 2016, arXiv 1607.06450) or
// RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467).
struct Norm {
  const float* weight;
  const float* bias;  // or null
  float eps;
  bool rms;

  // That of layer `i`, of a stack of norms over `features` of which this is the first.
  Norm of_layer(int64_t i, int64_t features) const {
    return {weight ? weight + i * features : nullptr, bias ? bias + i * features : nullptr, eps,
            rms};
  }
};

enum class Activation { kNone, kGeluTanh, kGelu, kRelu, kSilu };

// Where results go, float32 [rows, out_features], and what is done to them on the way, in this
// order. `residual` is shaped like `data`, which it may be, or null.
struct Results {
  float* data;
  int64_t stride;
  Activation activation = Activation::kNone;
  const float* residual = nullptr;  // added

  Results from(int64_t row, int64_t feature) const {
    const int64_t offset = row * stride + feature;
    return {data + offset, stride, activation, residual ? residual + offset : nullptr};
  }
};

}  // namespace convai_fast::packed_linear
