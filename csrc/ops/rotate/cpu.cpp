#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/rotate/rotate.h"

#define CONVAI_FAST_KERNEL "ops/rotate/cpu_kernel.h"
#include "simd/each_isa.h"

namespace convai_fast::rotate {
namespace {

constexpr int64_t kValuesPerTask = 1 << 14;

// x [tokens, heads, head_dim]; cosines and sines float32 [tokens, head_dim / 2].
at::Tensor rotate_cpu(const at::Tensor& x, const at::Tensor& cosines, const at::Tensor& sines) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(2) % 2 == 0, "rotate: x must be [tokens, heads, ",
                    "head_dim] with an even head_dim, not ", x.sizes());
  const int64_t tokens = x.size(0), heads = x.size(1), half = x.size(2) / 2;
  for (const auto* part : {&cosines, &sines}) {
    check_tensor(*part, "rotate: cosines and sines", at::kFloat, 2);
    TORCH_CHECK_VALUE(part->size(0) == tokens && part->size(1) == half, "rotate: cosines and ",
                      "sines ", part->sizes(), " do not fit x ", x.sizes());
  }
  if (!is_float_or_bfloat16(x)) {
    const auto halves = x.chunk(2, -1);
    const auto cos = cosines.unsqueeze(1), sin = sines.unsqueeze(1);
    return at::cat({halves[0] * cos - halves[1] * sin, halves[1] * cos + halves[0] * sin}, -1)
        .to(x.scalar_type());
  }
  const auto dense = with_dense_heads(x);
  auto out = at::empty(x.sizes(), x.options());
  for_scalar(x, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const auto kernel = CONVAI_FAST_DISPATCH(rotate_kernel<Scalar>);
    const auto* from = static_cast<const Scalar*>(dense.const_data_ptr());
    const auto *cos = cosines.const_data_ptr<float>(), *sin = sines.const_data_ptr<float>();
    auto* to = static_cast<Scalar*>(out.mutable_data_ptr());
    const int64_t width = 2 * half * heads, stride = dense.stride(0);
    at::parallel_for(0, tokens, kValuesPerTask / (width + 1) + 1, [&](int64_t i, int64_t end) {
      for (; i < end; ++i) {
        kernel(from + i * stride, cos + i * half, sin + i * half, half, heads, to + i * width);
      }
    });
  });
  return out;
}

}  // namespace

void rotate_heads(const float* x, const float* cosines, const float* sines, int64_t half,
                  int64_t heads, float* to) {
  CONVAI_FAST_DISPATCH(rotate_kernel<float>)(x, cosines, sines, half, heads, to);
}

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) { m.impl("rotate", &rotate_cpu); }

}  // namespace convai_fast::rotate
