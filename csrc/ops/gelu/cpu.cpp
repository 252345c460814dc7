#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "ops/check.h"

#define CONVAI_FAST_KERNEL "ops/gelu/cpu_kernel.h"
#include "simd/each_isa.h"

namespace convai_fast::gelu {
namespace {

constexpr int64_t kValuesPerTask = 1 << 14;

// GELU of x; with a gradient, what that is before it.
at::Tensor run(const std::optional<at::Tensor>& grad, const at::Tensor& x) {
  const auto dense = x.contiguous(), dense_grad = grad ? grad->contiguous() : at::Tensor();
  auto out = at::empty(x.sizes(), x.options());
  for_scalar(x, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const auto kernel = CONVAI_FAST_DISPATCH(gelu_kernel<Scalar>);
    const auto* from = static_cast<const Scalar*>(dense.const_data_ptr());
    const auto* given = grad ? static_cast<const Scalar*>(dense_grad.const_data_ptr()) : nullptr;
    auto* to = static_cast<Scalar*>(out.mutable_data_ptr());
    at::parallel_for(0, x.numel(), kValuesPerTask, [&](int64_t begin, int64_t end) {
      kernel(given ? given + begin : nullptr, from + begin, end - begin, to + begin);
    });
  });
  return out;
}

at::Tensor gelu_cpu(const at::Tensor& x) {
  return is_float_or_bfloat16(x) ? run(std::nullopt, x) : at::gelu(x, "tanh");
}

at::Tensor gelu_backward_cpu(const at::Tensor& grad, const at::Tensor& x) {
  TORCH_CHECK_TYPE(grad.scalar_type() == x.scalar_type(), "gelu: grad must be ", x.scalar_type(),
                   ", not ", grad.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes(), "gelu: grad ", grad.sizes(), " does not fit x ",
                    x.sizes());
  return is_float_or_bfloat16(x) ? run(grad, x) : at::gelu_backward(grad, x, "tanh");
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) {
  m.impl("gelu", &gelu_cpu);
  m.impl("gelu_backward", &gelu_backward_cpu);
}

}  // namespace convai_fast::gelu
