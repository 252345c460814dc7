#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/packed_linear/arguments.h"

#define CONVAI_FAST_KERNEL "ops/packed_linear/cpu_kernel.h"
#include "simd/each_isa.h"

namespace convai_fast::packed_linear {
namespace {

// Below this many multiplications a second thread costs more than it saves.
constexpr int64_t kProductsPerTask = 1 << 17;

template <typename Weight>
void multiply(const Arguments& a) {
  const int64_t products = std::max<int64_t>(1, a.rows * a.in_features * kPanel);
  const auto kernel = CONVAI_FAST_DISPATCH(packed_linear_kernel<Weight>);
  at::parallel_for(0, simd::round_up(a.out_features, kPanel) / kPanel,
                   std::max<int64_t>(1, kProductsPerTask / products),
                   [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

at::Tensor packed_linear_cpu(const at::Tensor& x, const at::Tensor& weight,
                             const std::optional<at::Tensor>& scales,
                             const std::optional<at::Tensor>& bias, int64_t out_features,
                             bool gelu) {
  check_tensor(x, "packed_linear: x", at::kFloat, x.dim());
  const auto kind = weight.scalar_type();
  const bool int8 = kind == at::kChar;
  TORCH_CHECK_TYPE(int8 || kind == at::kFloat || kind == at::kBFloat16,
                   "packed_linear: weight must be float32, bfloat16 or int8, not ", kind);
  check_tensor(weight, "packed_linear: weight", kind, int8 ? 4 : 3);
  TORCH_CHECK_VALUE(x.dim() >= 1, "packed_linear: x must have at least one dimension");
  const int64_t in_features = x.size(-1);
  const int64_t panels = simd::round_up(out_features, kPanel) / kPanel;
  const bool fits = out_features >= 0 && weight.size(0) == panels &&
                    (int8 ? weight.size(1) == (in_features + 1) / 2 && weight.size(2) == kPanel &&
                                weight.size(3) == 2
                          : weight.size(1) == in_features && weight.size(2) == kPanel);
  TORCH_CHECK_VALUE(fits, "packed_linear: weight of shape ", weight.sizes(), " does not fit x of ",
                    "shape ", x.sizes(), " and ", out_features, " out_features");
  TORCH_CHECK_VALUE(scales.has_value() == int8, "packed_linear: scales go with int8 weights");
  for (const auto& [vector, name] : {std::pair{&scales, "scales"}, {&bias, "bias"}}) {
    if (!vector->has_value()) continue;
    check_tensor(**vector, name, at::kFloat, 1);
    TORCH_CHECK_VALUE((*vector)->size(0) == out_features, "packed_linear: ", name, " must have ",
                      out_features, " values, not ", (*vector)->size(0));
  }

  auto shape = x.sizes().vec();
  shape.back() = out_features;
  auto out = at::empty(shape, x.options());
  const int64_t rows =
      in_features == 0 ? out.numel() / std::max<int64_t>(1, out_features) : x.numel() / in_features;
  if (out.numel() == 0) return out;

  Arguments arguments{.x = x.const_data_ptr<float>(),
                      .x_scales = nullptr,
                      .weight = weight.const_data_ptr(),
                      .scales = int8 ? scales->const_data_ptr<float>() : nullptr,
                      .bias = bias ? bias->const_data_ptr<float>() : nullptr,
                      .out = out.mutable_data_ptr<float>(),
                      .rows = rows,
                      .in_features = in_features,
                      .out_features = out_features,
                      .gelu = gelu};
  at::Tensor quantized, x_scales;
  if (int8) {
    const int64_t stride = in_features + in_features % 2;
    quantized = at::empty({rows, stride}, x.options().dtype(at::kShort));
    x_scales = at::empty({rows}, x.options());
    int16_t* to = quantized.mutable_data_ptr<int16_t>();
    float* to_scales = x_scales.mutable_data_ptr<float>();
    const float* from = x.const_data_ptr<float>();
    at::parallel_for(0, rows, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, stride)),
                     [&](int64_t i, int64_t end) {
                       for (; i < end; ++i) {
                         to_scales[i] =
                             quantize_row(from + i * in_features, in_features, to + i * stride);
                       }
                     });
    arguments.x = to;
    arguments.x_scales = to_scales;
  }
  if (int8) {
    multiply<int8_t>(arguments);
  } else if (kind == at::kBFloat16) {
    multiply<simd::BFloat16>(arguments);
  } else {
    multiply<float>(arguments);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) { m.impl("packed_linear", &packed_linear_cpu); }

}  // namespace convai_fast::packed_linear
