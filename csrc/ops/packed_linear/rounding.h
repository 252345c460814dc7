// Rounding rows of x to the format of the weight.
#include <cmath>
#include <limits>

#include "ops/packed_linear/arguments.h"

namespace convai_fast::packed_linear::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;

// To float32 or bfloat16; padded with 0.
template <typename Activation>
CONVAI_FAST_INLINE void round_row(const float* x, int64_t in_features, int64_t padded,
                                  Activation* to, float*, int32_t*) {
  round_to(x, in_features, to);
  std::fill(to + in_features, to + padded, Activation{});
}

// To whole steps from 0 to 255 of a scale that just holds the row and 0; padded with 0. A row that
// is not finite has no such scale: NaN carries it to the results.
CONVAI_FAST_INLINE void round_row(const float* x, int64_t in_features, int64_t padded, uint8_t* to,
                                  float* scale, int32_t* zero) {
  Simd::Float least{}, most{}, difference{};
  int64_t k = 0;
  for (; k + kWidth <= in_features; k += kWidth) {
    const auto values = Simd::load(x + k);
    least = -Simd::max(-least, -values);
    most = Simd::max(most, values);
    difference += values - values;  // NaN if any is infinite or NaN
  }
  float low = -Simd::max(-least), high = Simd::max(most), is_finite = Simd::sum(difference);
  for (int64_t rest = k; rest < in_features; ++rest) {
    low = std::min(low, x[rest]);
    high = std::max(high, x[rest]);
    is_finite += x[rest] - x[rest];
  }
  *scale = high / 255 - low / 255;
  *zero = 0;
  std::fill(to + in_features, to + padded, uint8_t{0});
  if (is_finite != 0 || !(*scale >= std::numeric_limits<float>::min())) {
    std::fill_n(to, in_features, uint8_t{0});
    *scale = is_finite != 0 ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
    return;
  }
  const float inverse = 1 / *scale;
  *zero = static_cast<int32_t>(std::nearbyint(-low * inverse));
  k = 0;
  for (; k + kWidth <= in_features; k += kWidth) {
    Simd::store_bytes(to + k, Simd::nearest(Simd::load(x + k) * inverse) + *zero);
  }
  for (; k < in_features; ++k) {
    const auto step = static_cast<int32_t>(std::nearbyint(x[k] * inverse)) + *zero;
    to[k] = static_cast<uint8_t>(std::clamp(step, 0, 255));
  }
}

// Sums are made in one order for every row.
CONVAI_FAST_INLINE float sum_of_squares(const float* x, int64_t count, float mean) {
  Simd::Float sums{};
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) {
    const auto difference = Simd::load(x + k) - mean;
    sums += difference * difference;
  }
  float sum = Simd::sum(sums);
  for (; k < count; ++k) sum += (x[k] - mean) * (x[k] - mean);
  return sum;
}

CONVAI_FAST_INLINE float sum_of(const float* x, int64_t count) {
  Simd::Float sums{};
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) sums += Simd::load(x + k);
  float sum = Simd::sum(sums);
  for (; k < count; ++k) sum += x[k];
  return sum;
}

// `to` may be `x`.
CONVAI_FAST_INLINE void normalize_row(const float* x, int64_t count, const Norm& norm, float* to) {
  const float mean = norm.rms ? 0.0f : sum_of(x, count) / static_cast<float>(count);
  const float variance = sum_of_squares(x, count, mean) / static_cast<float>(count);
  const float scale = 1 / std::sqrt(variance + norm.eps);
  for (int64_t k = 0; k < count; ++k) {
    to[k] = (x[k] - mean) * scale * norm.weight[k] + (norm.bias ? norm.bias[k] : 0.0f);
  }
}

CONVAI_FAST_TARGET void normalize_rows_kernel(float* x, int64_t rows, int64_t features,
                                              const Norm& norm) {
  for (; rows > 0; --rows, x += features) normalize_row(x, features, norm, x);
}

// With a norm, of the rows normalized, for which `row` has the room of one.
template <typename Scalar>
CONVAI_FAST_TARGET void round_rows_kernel(const float* x, int64_t stride, int64_t rows,
                                          const Norm* norm, float* row,
                                          const Weight<Scalar>& weight,
                                          typename Format<Scalar>::Activation* to, float* scales,
                                          int32_t* zeros) {
  const int64_t padded = weight.padded_features();
  for (int64_t i = 0; i < rows; ++i) {
    const float* values = x + i * stride;
    if (norm) {
      normalize_row(values, weight.in_features, *norm, row);
      values = row;
    }
    round_row(values, weight.in_features, padded, to + i * padded, scales + i, zeros + i);
  }
}

}  // namespace convai_fast::packed_linear::CONVAI_FAST_ISA
