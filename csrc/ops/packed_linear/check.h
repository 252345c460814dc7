// A packed weight as tensors, checked.
#pragma once

#include "ops/check.h"
#include "ops/packed_linear/arguments.h"

namespace convai_fast::packed_linear {

struct Packed {
  at::Tensor data;
  std::optional<at::Tensor> scales, column_sums, bias;
};

// Calls `function` with a value of the type that the weight's elements have.
template <typename Function>
auto for_format(const char* op, const at::Tensor& weight, const Function& function) {
  const auto kind = weight.scalar_type();
  TORCH_CHECK_TYPE(kind == at::kChar || kind == at::kFloat || kind == at::kBFloat16, op,
                   ": weight must be float32, bfloat16 or int8, not ", kind);
  if (kind == at::kChar) return function(int8_t{});
  return kind == at::kFloat ? function(float{}) : function(simd::BFloat16{});
}

inline Activation activation_of(const char* op, std::string_view name) {
  if (name == "gelu_new") return Activation::kGeluTanh;
  if (name == "gelu") return Activation::kGelu;
  if (name == "relu") return Activation::kRelu;
  TORCH_CHECK_VALUE(name == "silu", op, ": activation must be gelu_new, gelu, relu or silu, not ",
                    name);
  return Activation::kSilu;
}

using Shape = c10::SmallVector<int64_t, 5>;

// `shape`, after that of a stack of such tensors.
inline Shape stacked(at::IntArrayRef stack, at::IntArrayRef shape) {
  Shape sizes(stack.begin(), stack.end());
  sizes.append(shape.begin(), shape.end());
  return sizes;
}

// `scales`, `column_sums` or `bias` of a weight, or of a stack of weights.
template <typename Value>
const Value* vector_of(const char* op, const char* name, const std::optional<at::Tensor>& vector,
                       at::IntArrayRef stack, int64_t size) {
  if (!vector) return nullptr;
  const std::string what = std::string(op) + ": " + name;
  const Shape shape = stacked(stack, {size});
  check_tensor(*vector, what.c_str(), c10::CppTypeToScalarType<Value>::value, shape.size());
  TORCH_CHECK_VALUE(vector->sizes().equals(shape), what, " must have shape ",
                    at::IntArrayRef(shape), ", not ", vector->sizes());
  return vector->const_data_ptr<Value>();
}

// A weight; of a stack [layers] of them, the first.
template <typename Scalar>
Weight<Scalar> weight_of(const char* op, const Packed& packed, at::IntArrayRef stack,
                         int64_t in_features, int64_t out_features) {
  constexpr bool kInt8 = std::is_same_v<Scalar, int8_t>;
  constexpr int64_t kTogether = Format<Scalar>::kTogether;
  const auto kind = kInt8 ? at::kChar : kTogether == 2 ? at::kBFloat16 : at::kFloat;
  const Shape shape =
      stacked(stack, {simd::round_up(out_features, kBlock) / kBlock,
                      simd::round_up(in_features, kTogether) / kTogether, kBlock, kTogether});
  check_tensor(packed.data, (std::string(op) + ": weight").c_str(), kind, shape.size());
  TORCH_CHECK_VALUE(out_features >= 0 && packed.data.sizes().equals(shape), op,
                    ": weight of shape ", packed.data.sizes(), " does not fit ", in_features,
                    " in_features and ", out_features, " out_features, which need ",
                    at::IntArrayRef(shape));
  TORCH_CHECK_VALUE(!kInt8 || in_features <= kMostInt8Features, op,
                    ": int8 weights may have up to ", kMostInt8Features, " in_features, not ",
                    in_features);
  TORCH_CHECK_VALUE(packed.scales.has_value() == kInt8 && packed.column_sums.has_value() == kInt8,
                    op, ": scales and column_sums go with int8 weights");
  return {
      .data = static_cast<const Scalar*>(packed.data.const_data_ptr()),
      .scales = vector_of<float>(op, "scales", packed.scales, stack, out_features),
      .column_sums = vector_of<int32_t>(op, "column_sums", packed.column_sums, stack, out_features),
      .bias = vector_of<float>(op, "bias", packed.bias, stack, out_features),
      .in_features = in_features,
      .out_features = out_features};
}

}  // namespace convai_fast::packed_linear
