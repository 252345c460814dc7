// The types of numbers that CUDA kernels compute with.
#pragma once

#include <ATen/core/Tensor.h>

namespace convai_fast {

// Calls `function` with a value of the type of x's elements: float32, bfloat16 or float16, which an
// operator's checks have seen to.
template <typename Function>
void for_float(const at::Tensor& x, const Function& function) {
  switch (x.scalar_type()) {
    case at::kFloat:
      function(float{});
      break;
    case at::kBFloat16:
      function(at::BFloat16{});
      break;
    default:
      function(at::Half{});
  }
}

}  // namespace convai_fast
