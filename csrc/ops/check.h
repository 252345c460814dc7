// Checks on the tensors that an operator is given.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace convai_fast {

inline void check_tensor(const at::Tensor& tensor, const char* name, at::ScalarType dtype,
                         int64_t dim) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", not ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == dim, name, " must have ", dim, " dimension(s), not ",
                    tensor.dim());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous");
}

}  // namespace convai_fast
