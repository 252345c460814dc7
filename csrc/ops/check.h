// Checks on the tensors that an operator is given.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "ops/heads.h"
#include "simd/half.h"

namespace convai_fast {

inline void check_tensor(const at::Tensor& tensor, const char* name, at::ScalarType dtype,
                         int64_t dim) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", not ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == dim, name, " must have ", dim, " dimension(s), not ",
                    tensor.dim());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous");
}

// Calls `function` with a value of the type of x's elements, which is float32 or bfloat16.
template <typename Function>
auto for_scalar(const at::Tensor& x, const Function& function) {
  return x.scalar_type() == at::kFloat ? function(float{}) : function(simd::BFloat16{});
}

// Whether x is of one of the types that `for_scalar` tells apart.
inline bool is_float_or_bfloat16(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16;
}

// `x` [tokens, num_heads, head_dim], copied unless a token's heads lie side by side in it.
inline at::Tensor with_dense_heads(const at::Tensor& x) {
  const bool is_dense = (x.size(2) == 1 || x.stride(2) == 1) &&
                        (x.size(1) == 1 || x.stride(1) == x.size(2)) && x.stride(0) >= 0;
  return is_dense ? x : x.contiguous();
}

// `x` must be as `with_dense_heads` gives it, or undefined.
template <typename Scalar>
Heads<Scalar> heads_of(const at::Tensor& x) {
  if (!x.defined()) return {};
  return {static_cast<Scalar*>(x.data_ptr()), x.stride(0), x.size(2)};
}

}  // namespace convai_fast
