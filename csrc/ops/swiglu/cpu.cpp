#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "ops/check.h"

#define CONVAI_FAST_KERNEL "ops/swiglu/cpu_kernel.h"
#include "simd/each_isa.h"

namespace convai_fast::swiglu {
namespace {

constexpr int64_t kValuesPerTask = 1 << 14;

void check(const at::Tensor& x, const char* name, const at::Tensor& gate) {
  TORCH_CHECK_TYPE(x.scalar_type() == gate.scalar_type(), "swiglu: ", name, " must be ",
                   gate.scalar_type(), ", not ", x.scalar_type());
  TORCH_CHECK_VALUE(x.sizes() == gate.sizes(), "swiglu: ", name, " ", x.sizes(),
                    " does not fit gate ", gate.sizes());
}

at::Tensor swiglu_cpu(const at::Tensor& gate, const at::Tensor& up) {
  check(up, "up", gate);
  if (!is_float_or_bfloat16(gate)) return at::silu(gate) * up;
  const auto dense_gate = gate.contiguous(), dense_up = up.contiguous();
  auto out = at::empty(gate.sizes(), gate.options());
  for_scalar(gate, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const auto kernel = CONVAI_FAST_DISPATCH(swiglu_kernel<Scalar>);
    const auto* x = static_cast<const Scalar*>(dense_gate.const_data_ptr());
    const auto* y = static_cast<const Scalar*>(dense_up.const_data_ptr());
    auto* to = static_cast<Scalar*>(out.mutable_data_ptr());
    at::parallel_for(0, out.numel(), kValuesPerTask, [&](int64_t begin, int64_t end) {
      kernel(x + begin, y + begin, end - begin, to + begin);
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> swiglu_backward_cpu(const at::Tensor& grad,
                                                       const at::Tensor& gate,
                                                       const at::Tensor& up) {
  check(up, "up", gate);
  check(grad, "grad", gate);
  if (!is_float_or_bfloat16(gate))
    return {at::silu_backward(grad * up, gate), grad * at::silu(gate)};
  const auto dense_grad = grad.contiguous(), dense_gate = gate.contiguous(),
             dense_up = up.contiguous();
  auto for_gate = at::empty(gate.sizes(), gate.options());
  auto for_up = at::empty(gate.sizes(), gate.options());
  for_scalar(gate, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const auto kernel = CONVAI_FAST_DISPATCH(swiglu_backward_kernel<Scalar>);
    const auto* g = static_cast<const Scalar*>(dense_grad.const_data_ptr());
    const auto* x = static_cast<const Scalar*>(dense_gate.const_data_ptr());
    const auto* y = static_cast<const Scalar*>(dense_up.const_data_ptr());
    auto* to_gate = static_cast<Scalar*>(for_gate.mutable_data_ptr());
    auto* to_up = static_cast<Scalar*>(for_up.mutable_data_ptr());
    at::parallel_for(0, gate.numel(), kValuesPerTask, [&](int64_t i, int64_t end) {
      kernel(g + i, x + i, y + i, end - i, to_gate + i, to_up + i);
    });
  });
  return {for_gate, for_up};
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) {
  m.impl("swiglu", &swiglu_cpu);
  m.impl("swiglu_backward", &swiglu_backward_cpu);
}

}  // namespace convai_fast::swiglu
