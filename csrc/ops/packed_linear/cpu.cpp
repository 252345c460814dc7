#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/packed_linear/product.h"

namespace convai_fast::packed_linear {
namespace {

template <typename Scalar>
void multiply_all(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& scales,
                  const std::optional<at::Tensor>& column_sums,
                  const std::optional<at::Tensor>& bias, bool gelu, at::Tensor& out) {
  const int64_t in_features = x.size(-1), out_features = out.size(-1);
  const auto floats = [](const std::optional<at::Tensor>& vector) {
    return vector ? vector->const_data_ptr<float>() : nullptr;
  };
  multiply<Scalar>(x.const_data_ptr<float>(), in_features, out.numel() / out_features,
                   {.data = static_cast<const Scalar*>(weight.const_data_ptr()),
                    .scales = floats(scales),
                    .column_sums = column_sums ? column_sums->const_data_ptr<int32_t>() : nullptr,
                    .bias = floats(bias),
                    .in_features = in_features,
                    .out_features = out_features},
                   {.data = out.mutable_data_ptr<float>(),
                    .stride = out_features,
                    .gelu = gelu,
                    .residual = nullptr});
}

at::Tensor packed_linear_cpu(const at::Tensor& x, const at::Tensor& weight,
                             const std::optional<at::Tensor>& scales,
                             const std::optional<at::Tensor>& column_sums,
                             const std::optional<at::Tensor>& bias, int64_t out_features,
                             bool gelu) {
  check_tensor(x, "packed_linear: x", at::kFloat, x.dim());
  TORCH_CHECK_VALUE(x.dim() >= 1, "packed_linear: x must have at least one dimension");
  const auto kind = weight.scalar_type();
  const bool int8 = kind == at::kChar;
  TORCH_CHECK_TYPE(int8 || kind == at::kFloat || kind == at::kBFloat16,
                   "packed_linear: weight must be float32, bfloat16 or int8, not ", kind);
  check_tensor(weight, "packed_linear: weight", kind, 4);
  const int64_t in_features = x.size(-1), together = int8 ? 4 : kind == at::kBFloat16 ? 2 : 1;
  const bool fits = out_features >= 0 &&
                    weight.size(0) == simd::round_up(out_features, kBlock) / kBlock &&
                    weight.size(1) == simd::round_up(in_features, together) / together &&
                    weight.size(2) == kBlock && weight.size(3) == together;
  TORCH_CHECK_VALUE(fits, "packed_linear: weight of shape ", weight.sizes(), " does not fit x of ",
                    "shape ", x.sizes(), " and ", out_features, " out_features");
  TORCH_CHECK_VALUE(!int8 || in_features <= kMostInt8Features, "packed_linear: int8 weights may ",
                    "have up to ", kMostInt8Features, " in_features, not ", in_features);
  TORCH_CHECK_VALUE(scales.has_value() == int8 && column_sums.has_value() == int8,
                    "packed_linear: scales and column_sums go with int8 weights");
  const auto check_vector = [&](const std::optional<at::Tensor>& vector, const char* name,
                                at::ScalarType dtype) {
    if (!vector) return;
    check_tensor(*vector, name, dtype, 1);
    TORCH_CHECK_VALUE(vector->size(0) == out_features, "packed_linear: ", name, " must have ",
                      out_features, " values, not ", vector->size(0));
  };
  check_vector(scales, "scales", at::kFloat);
  check_vector(column_sums, "column_sums", at::kInt);
  check_vector(bias, "bias", at::kFloat);

  auto shape = x.sizes().vec();
  shape.back() = out_features;
  auto out = at::empty(shape, x.options());
  if (out.numel() == 0) return out;
  const auto multiply_as = int8                    ? multiply_all<int8_t>
                           : kind == at::kBFloat16 ? multiply_all<simd::BFloat16>
                                                   : multiply_all<float>;
  multiply_as(x, weight, scales, column_sums, bias, gelu, out);
  return out;
}

template <typename Scalar>
std::string instructions() {
  if (onednn_multiplies<Scalar>()) return onednn_instructions<Scalar>() + " by oneDNN";
  return simd::isa_name(simd::current_isa());
}

std::string packed_linear_instructions_cpu(const at::Tensor& weight) {
  const auto kind = weight.scalar_type();
  if (kind == at::kChar) return instructions<int8_t>();
  return kind == at::kBFloat16 ? instructions<simd::BFloat16>() : instructions<float>();
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) {
  m.impl("packed_linear", &packed_linear_cpu);
  m.impl("packed_linear_instructions", &packed_linear_instructions_cpu);
}

}  // namespace convai_fast::packed_linear
