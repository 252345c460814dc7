#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "ops/check.h"

#define CONVAI_FAST_KERNEL "ops/rms_norm/cpu_kernel.h"
#include "simd/each_isa.h"

namespace convai_fast::rms_norm {
namespace {

constexpr int64_t kValuesPerTask = 1 << 14;
// Of which the weight's gradient is summed up by itself, so that no sum depends on the threads.
constexpr int64_t kRowsOfSum = 128;

void check(const at::Tensor& x, const at::Tensor& weight, double eps) {
  TORCH_CHECK_VALUE(eps >= 0, "rms_norm: eps must not be below 0, and is ", eps);
  TORCH_CHECK_VALUE(x.dim() > 0 && weight.dim() == 1 && weight.size(0) == x.size(-1),
                    "rms_norm: weight ", weight.sizes(), " does not fit x ", x.sizes());
}

at::Tensor rms_norm_cpu(const at::Tensor& x, const at::Tensor& weight, double eps,
                        at::ScalarType dtype) {
  check(x, weight, eps);
  auto out = at::empty(x.sizes(), x.options().dtype(dtype));
  if (!is_float_or_bfloat16(x) || !is_float_or_bfloat16(out) ||
      weight.scalar_type() != at::kFloat) {
    return at::rms_norm(x, weight.sizes(), weight.to(x.scalar_type()), eps).to(dtype);
  }
  const auto dense = x.contiguous(), scales = weight.contiguous();
  const int64_t size = weight.size(0), rows = size > 0 ? x.numel() / size : 0;
  for_scalar(x, [&](auto x_scalar) {
    for_scalar(out, [&](auto out_scalar) {
      using X = decltype(x_scalar);
      using Out = decltype(out_scalar);
      const auto kernel = CONVAI_FAST_DISPATCH(rms_norm_kernel<X, Out>);
      const auto* from = static_cast<const X*>(dense.const_data_ptr());
      auto* to = static_cast<Out*>(out.mutable_data_ptr());
      at::parallel_for(0, rows, kValuesPerTask / (size + 1) + 1, [&](int64_t i, int64_t end) {
        kernel(from + i * size, scales.const_data_ptr<float>(), static_cast<float>(eps), end - i,
               size, to + i * size);
      });
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> backward_by_torch(const at::Tensor& grad, const at::Tensor& x,
                                                     const at::Tensor& weight, double eps) {
  const auto kind = at::promote_types(x.scalar_type(), at::kFloat);
  const auto v = x.to(kind), g = grad.to(kind);
  const auto scale = (v.square().mean(-1, true) + eps).rsqrt();
  const auto weighted = g * weight.to(kind);
  const auto for_x = (weighted - v * scale.square() * (weighted * v).mean(-1, true)) * scale;
  const auto for_weight = (g * v * scale).reshape({-1, weight.size(0)}).sum(0);
  return {for_x.to(x.scalar_type()), for_weight.to(weight.scalar_type())};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward_cpu(const at::Tensor& grad,
                                                         const at::Tensor& x,
                                                         const at::Tensor& weight, double eps) {
  check(x, weight, eps);
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes(), "rms_norm: grad ", grad.sizes(), " does not fit x ",
                    x.sizes());
  if (!is_float_or_bfloat16(x) || !is_float_or_bfloat16(grad) ||
      weight.scalar_type() != at::kFloat) {
    return backward_by_torch(grad, x, weight, eps);
  }
  const auto dense_grad = grad.contiguous(), dense = x.contiguous(), scales = weight.contiguous();
  auto for_x = at::empty(x.sizes(), x.options());
  const int64_t size = weight.size(0), rows = size > 0 ? x.numel() / size : 0;
  const int64_t sums = (rows + kRowsOfSum - 1) / kRowsOfSum;
  auto for_weight = at::zeros({sums, size}, weight.options());
  for_scalar(x, [&](auto x_scalar) {
    for_scalar(grad, [&](auto grad_scalar) {
      using X = decltype(x_scalar);
      using Out = decltype(grad_scalar);
      const auto kernel = CONVAI_FAST_DISPATCH(rms_norm_backward_kernel<X, Out>);
      const auto* g = static_cast<const Out*>(dense_grad.const_data_ptr());
      const auto* from = static_cast<const X*>(dense.const_data_ptr());
      auto* to = static_cast<X*>(for_x.mutable_data_ptr());
      at::parallel_for(0, sums, 1, [&](int64_t i, int64_t end) {
        for (; i < end; ++i) {
          const int64_t first = i * kRowsOfSum, count = std::min(kRowsOfSum, rows - first);
          kernel(g + first * size, from + first * size, scales.const_data_ptr<float>(),
                 static_cast<float>(eps), count, size, to + first * size,
                 for_weight.mutable_data_ptr<float>() + i * size);
        }
      });
    });
  });
  return {for_x, for_weight.sum(0)};
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) {
  m.impl("rms_norm", &rms_norm_cpu);
  m.impl("rms_norm_backward", &rms_norm_backward_cpu);
}

}  // namespace convai_fast::rms_norm
