// What the kernel of `packed_linear` is given, and the rounding of x for int8 weights.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd/vector_types.h"

namespace convai_fast::packed_linear {

using simd::kPanel;

struct Arguments {
  const void* x;          // float [rows, in_features]; int16 for int8 weights
  const float* x_scales;  // [rows], for int8 weights
  const void* weight;
  const float* scales;  // [out_features], for int8 weights
  const float* bias;    // [out_features] or null
  float* out;           // [rows, out_features]
  int64_t rows, in_features, out_features;
  bool gelu;  // whether out is activated by the tanh approximation of GELU
};

// The largest int16 that `in_features` products with int8 weights can be made of without leaving
// int32: 127 * 22,017 * 768 < 2^31.
inline float largest_int16(int64_t in_features) {
  const int64_t limit = (int64_t{1} << 31) / (127 * std::max<int64_t>(1, in_features)) - 1;
  return static_cast<float>(std::clamp<int64_t>(limit, 1, 32767));
}

// Rounds one row to int16 and returns its scale. Padded to an even length with 0.
inline float quantize_row(const float* x, int64_t in_features, int16_t* quantized) {
  float largest = 0;
  bool is_finite = true;
  for (int64_t k = 0; k < in_features; ++k) {
    largest = std::max(largest, std::fabs(x[k]));
    is_finite &= std::fabs(x[k]) <= std::numeric_limits<float>::max();
  }
  if (!is_finite) {  // no integer stands for it: let the scale carry it to the results
    std::fill_n(quantized, in_features + in_features % 2, int16_t{0});
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float limit = largest_int16(in_features);
  const float inverse = largest > 0 ? limit / largest : 0.0f;
  for (int64_t k = 0; k < in_features; ++k) {
    quantized[k] = static_cast<int16_t>(std::lrintf(x[k] * inverse));
  }
  if (in_features % 2) quantized[in_features] = 0;
  return largest / limit;
}

}  // namespace convai_fast::packed_linear
