#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#define CONVAI_FAST_KERNEL "ops/gelu/cpu_kernel.h"
#include "simd/each_isa.h"

namespace convai_fast::gelu {
namespace {

using simd::BFloat16;

constexpr int64_t kValuesPerTask = 1 << 14;

bool is_ours(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16;
}

// Of contiguous tensors of one size.
template <typename Scalar>
void fill(const at::Tensor* grad, const at::Tensor& x, at::Tensor& out) {
  const auto forward = CONVAI_FAST_DISPATCH(gelu_kernel<Scalar>);
  const auto backward = CONVAI_FAST_DISPATCH(gelu_backward_kernel<Scalar>);
  const auto* from = static_cast<const Scalar*>(x.const_data_ptr());
  const auto* slopes = grad ? static_cast<const Scalar*>(grad->const_data_ptr()) : nullptr;
  auto* to = static_cast<Scalar*>(out.mutable_data_ptr());
  at::parallel_for(0, x.numel(), kValuesPerTask, [&](int64_t begin, int64_t end) {
    if (slopes) {
      backward(slopes + begin, from + begin, end - begin, to + begin);
    } else {
      forward(from + begin, end - begin, to + begin);
    }
  });
}

at::Tensor gelu_cpu(const at::Tensor& x) {
  if (!is_ours(x)) return at::gelu(x, "tanh");
  const auto dense = x.contiguous();
  auto out = at::empty(x.sizes(), x.options());
  x.scalar_type() == at::kFloat ? fill<float>(nullptr, dense, out)
                                : fill<BFloat16>(nullptr, dense, out);
  return out;
}

at::Tensor gelu_backward_cpu(const at::Tensor& grad, const at::Tensor& x) {
  TORCH_CHECK_TYPE(grad.scalar_type() == x.scalar_type(), "gelu: grad must be ", x.scalar_type(),
                   ", not ", grad.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes(), "gelu: grad ", grad.sizes(), " does not fit x ",
                    x.sizes());
  if (!is_ours(x)) return at::gelu_backward(grad, x, "tanh");
  const auto dense = x.contiguous(), dense_grad = grad.contiguous();
  auto out = at::empty(x.sizes(), x.options());
  x.scalar_type() == at::kFloat ? fill<float>(&dense_grad, dense, out)
                                : fill<BFloat16>(&dense_grad, dense, out);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) {
  m.impl("gelu", &gelu_cpu);
  m.impl("gelu_backward", &gelu_backward_cpu);
}

}  // namespace convai_fast::gelu
