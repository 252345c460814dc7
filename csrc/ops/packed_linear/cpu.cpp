#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/packed_linear/check.h"
#include "ops/packed_linear/onednn.h"
#include "ops/packed_linear/product.h"
#include "simd/isa.h"

namespace convai_fast::packed_linear {
namespace {

template <typename Scalar>
at::Tensor multiply_as(const at::Tensor& x, const Packed& packed, int64_t out_features,
                       Activation activation) {
  const int64_t in_features = x.size(-1);
  const auto weight = weight_of<Scalar>("packed_linear", packed, {}, in_features, out_features);
  auto shape = x.sizes().vec();
  shape.back() = out_features;
  auto out = at::empty(shape, x.options());
  if (out.numel() > 0) {
    multiply<Scalar>(
        x.const_data_ptr<float>(), in_features, out.numel() / out_features, nullptr, weight,
        {.data = out.mutable_data_ptr<float>(), .stride = out_features, .activation = activation});
  }
  return out;
}

at::Tensor packed_linear_cpu(const at::Tensor& x, const at::Tensor& weight,
                             const std::optional<at::Tensor>& scales,
                             const std::optional<at::Tensor>& column_sums,
                             const std::optional<at::Tensor>& bias, int64_t out_features,
                             std::optional<c10::string_view> name) {
  check_tensor(x, "packed_linear: x", at::kFloat, x.dim());
  TORCH_CHECK_VALUE(x.dim() >= 1, "packed_linear: x must have at least one dimension");
  const auto activation = name ? activation_of("packed_linear", *name) : Activation::kNone;
  const Packed packed{weight, scales, column_sums, bias};
  return for_format("packed_linear", weight, [&](auto scalar) {
    return multiply_as<decltype(scalar)>(x, packed, out_features, activation);
  });
}

template <typename Scalar>
std::string instructions() {
  if (onednn_multiplies<Scalar>()) return onednn_instructions<Scalar>() + " by oneDNN";
  return simd::isa_name(simd::current_isa());
}

std::string packed_linear_instructions_cpu(const at::Tensor& weight) {
  return for_format("packed_linear_instructions", weight,
                    [](auto scalar) { return instructions<decltype(scalar)>(); });
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) {
  m.impl("packed_linear", &packed_linear_cpu);
  m.impl("packed_linear_instructions", &packed_linear_instructions_cpu);
}

}  // namespace convai_fast::packed_linear
