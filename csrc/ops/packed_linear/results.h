// What becomes of the sums of a block before they leave the cache: int8's scales, bias, activation,
// and what they are multiplied with or added to.
#include <cmath>

#include "ops/packed_linear/arguments.h"

namespace convai_fast::packed_linear::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;

// The 64 values of a vector that begin at `first`; the last block's are copied to `edge`.
template <typename Value>
CONVAI_FAST_INLINE const Value* block_of(const Value* vector, int64_t first, int64_t valid,
                                         Value* edge) {
  if (vector == nullptr) return edge;
  if (valid == kBlock) return vector + first;
  std::copy_n(vector + first, valid, edge);
  return edge;
}

CONVAI_FAST_INLINE Simd::Float activated(Simd::Float x, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kGeluTanh:
      return Simd::gelu(x);
    case Activation::kRelu:
      return x < 0 ? Simd::Float{} : x;  // a NaN stays one
    case Activation::kSilu:
      return Simd::silu(x);
    case Activation::kGelu:
      break;
  }
  for (int i = 0; i < kWidth; ++i) x[i] *= 0.5f * std::erfc(-x[i] * 0.707106781f);
  return x;
}

// `sums` [rows, 64] of the block of output features that begins at `first`, to results that begin
// there, too; they are multiplied with `factor` [rows, 64] unless it is null.
template <typename Scalar>
CONVAI_FAST_TARGET void finish_kernel(const typename Format<Scalar>::Sum* sums, int64_t rows,
                                      const Weight<Scalar>& weight, const Rows<Scalar>& x,
                                      int64_t first, const float* factor, const Results& results) {
  const int64_t valid = std::min(kBlock, weight.out_features - first);
  float bias_edge[kBlock] = {}, scale_edge[kBlock] = {}, residual_edge[kBlock] = {}, out[kBlock];
  int32_t sum_edge[kBlock] = {};
  const float* bias = block_of(weight.bias, first, valid, bias_edge);
  const float* scales = block_of(weight.scales, first, valid, scale_edge);
  const int32_t* column_sums = block_of(weight.column_sums, first, valid, sum_edge);
  for (int64_t row = 0; row < rows; ++row, sums += kBlock) {
    const Results to = results.from(row, 0);
    const float* residual = to.residual ? block_of(to.residual, 0, valid, residual_edge) : nullptr;
    float* target = valid == kBlock ? to.data : out;
#pragma GCC unroll 4
    for (int64_t n = 0; n < kBlock; n += kWidth) {
      Simd::Float value;
      if constexpr (std::is_same_v<Scalar, int8_t>) {
        Simd::Int sum = Simd::load(sums + n) - Simd::load(column_sums + n) * x.zeros[row];
        value =
            __builtin_convertvector(sum, Simd::Float) * (Simd::load(scales + n) * x.scales[row]);
      } else {
        value = Simd::load(sums + n);
      }
      value += Simd::load(bias + n);
      if (to.activation != Activation::kNone) value = activated(value, to.activation);
      if (factor) value *= Simd::load(factor + row * kBlock + n);
      if (residual) value += Simd::load(residual + n);
      Simd::store(target + n, value);
    }
    if (valid < kBlock) std::copy_n(out, valid, to.data);
  }
}

}  // namespace convai_fast::packed_linear::CONVAI_FAST_ISA
