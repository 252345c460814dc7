// What `add_norm` is given, checked.
#pragma once

#include <optional>

#include "ops/check.h"

namespace convai_fast::add_norm {

inline void check_arguments(const at::Tensor& x, const at::Tensor& residual,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "add_norm: x must be float32, bfloat16 or float16, not ", dtype);
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) > 0, "add_norm: x must be [..., n_embd], not ",
                    x.sizes());
  const auto check = [&](const at::Tensor& tensor, const char* name, at::IntArrayRef sizes) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, "add_norm: ", name, " must be ", dtype,
                     ", as x is, not ", tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.sizes() == sizes, "add_norm: ", name, " must be ", sizes, ", not ",
                      tensor.sizes());
    TORCH_CHECK_VALUE(tensor.device() == x.device(), "add_norm: ", name, " is on ", tensor.device(),
                      " and x on ", x.device());
  };
  check(residual, "residual", x.sizes());
  check(weight, "weight", x.sizes().slice(x.dim() - 1));
  if (bias) check(*bias, "bias", x.sizes().slice(x.dim() - 1));
}

}  // namespace convai_fast::add_norm
