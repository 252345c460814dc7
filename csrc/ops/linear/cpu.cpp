#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/linear/product.h"
#include "ops/packed_linear/onednn.h"

namespace convai_fast::linear {
namespace {

using packed_linear::onednn_multiplies;
using simd::BFloat16;

// A batch has as many tokens as it happens to have, and oneDNN compiles a kernel for each number of
// features that are summed over. Where these are tokens, they are padded to a multiple of this.
constexpr int64_t kTokens = 16;
// That are summed at a time, in equal parts: a block of them takes 256 KB.
template <typename Scalar>
constexpr int64_t kTokensOfPart = (256 << 10) / (simd::kBlock * sizeof(Scalar));

template <typename Value>
const Value* data_of(const at::Tensor& x) {
  return static_cast<const Value*>(x.const_data_ptr());
}

template <typename Value>
Matrix<Value> matrix_of(const at::Tensor& x) {
  return {data_of<Value>(x), x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

// a [rows, features] b + bias, in the dtype of a.
template <typename Scalar>
at::Tensor product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias) {
  const int64_t features = simd::round_up(a.size(1), simd::Format<Scalar>::kTogether);
  const auto rows = features > a.size(1) ? at::constant_pad_nd(a, {0, features - a.size(1)}) : a;
  auto out = at::empty({a.size(0), b.size(1)}, a.options());
  multiply(data_of<Scalar>(rows), features, a.size(0), features, simd::features_of_part<Scalar>(),
           matrix_of<float>(b), bias.defined() ? data_of<float>(bias) : nullptr,
           static_cast<Scalar*>(out.mutable_data_ptr()));
  return out;
}

// The gradients of weight and bias: sums over the tokens of x and grad [tokens, features].
template <typename Scalar>
std::tuple<at::Tensor, at::Tensor> parameter_gradients(const at::Tensor& grad,
                                                       const at::Tensor& x) {
  const int64_t tokens = x.size(0), out_features = grad.size(1), in_features = x.size(1);
  const int64_t parts = at::divup(tokens, kTokensOfPart<Scalar>);
  const int64_t part = simd::round_up(at::divup(tokens, parts), kTokens);
  const int64_t padded = parts * part;
  const auto options = grad.options().dtype(at::kFloat);
  auto turned = at::empty({out_features, padded}, grad.options());
  auto for_bias = at::empty({out_features}, options);
  transpose(data_of<Scalar>(grad), tokens, out_features, padded,
            static_cast<Scalar*>(turned.mutable_data_ptr()), for_bias.mutable_data_ptr<float>());
  auto for_weight = at::empty({out_features, in_features}, options);
  multiply(data_of<Scalar>(turned), padded, out_features, padded, part, matrix_of<Scalar>(x),
           nullptr, for_weight.mutable_data_ptr<float>());
  return {for_weight, for_bias};
}

// Of two dimensions; in float32 where x is to be multiplied so.
at::Tensor rows_of(const at::Tensor& x, bool in_float32) {
  const auto rows = (x.dim() == 1 ? x.unsqueeze(0) : x.flatten(0, -2)).contiguous();
  return in_float32 ? rows.to(at::kFloat) : rows;
}

// Whether our own product multiplies x.
bool multiplies(const at::Tensor& x, const at::Tensor& weight, bool in_float32) {
  const auto kind = in_float32 ? at::kFloat : x.scalar_type();
  return x.numel() > 0 && weight.numel() > 0 && weight.scalar_type() == at::kFloat &&
         ((kind == at::kFloat && onednn_multiplies<float>()) ||
          (kind == at::kBFloat16 && onednn_multiplies<BFloat16>()));
}

at::Tensor by(const at::Tensor& rows, const at::Tensor& matrix, const at::Tensor& bias) {
  return for_scalar(rows,
                    [&](auto scalar) { return product<decltype(scalar)>(rows, matrix, bias); });
}

at::Tensor linear_cpu(const at::Tensor& x, const at::Tensor& weight,
                      const std::optional<at::Tensor>& bias, bool in_float32) {
  TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()),
                   "linear: x must be floating-point numbers, not ", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 1 && weight.dim() == 2 && x.size(-1) == weight.size(1), "linear: x ",
                    x.sizes(), " does not fit the weight ", weight.sizes());
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)),
                    "linear: the bias does not fit the weight ", weight.sizes());
  const auto kind = x.scalar_type();
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  if (!multiplies(x, weight, in_float32)) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
    const auto computed = in_float32 ? at::kFloat : kind;
    return at::linear(x.to(computed), weight.to(computed), bias ? bias->to(computed) : at::Tensor())
        .to(kind);
  }
  const auto matrix = weight.contiguous().t();
  const auto added = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  return by(rows_of(x, in_float32), matrix, added).to(kind).view(shape);
}

// x is there where the gradient of the weight is wanted.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward_cpu(
    const at::Tensor& grad, const std::optional<at::Tensor>& x, const at::Tensor& weight,
    bool in_float32, std::array<bool, 3> wanted) {
  const auto kind = grad.scalar_type();
  TORCH_CHECK_TYPE(at::isFloatingType(kind), "linear: grad must be floating-point numbers, not ",
                   kind);
  TORCH_CHECK_VALUE(grad.dim() >= 1 && weight.dim() == 2 && grad.size(-1) == weight.size(0),
                    "linear: grad ", grad.sizes(), " does not fit the weight ", weight.sizes());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  const bool is_ours = multiplies(grad, weight, in_float32);
  const auto computed = in_float32 ? at::kFloat : kind;
  const auto exact = at::promote_types(computed, at::kFloat);
  const auto rows = rows_of(grad, in_float32);
  auto shape = grad.sizes().vec();
  shape.back() = weight.size(1);
  at::Tensor for_x, for_weight, for_bias;
  if (wanted[0]) {
    for_x = is_ours ? by(rows, weight.contiguous(), {}) : rows.mm(weight.to(computed));
    for_x = for_x.to(kind).view(shape);
  }
  if (wanted[1]) {
    TORCH_CHECK_VALUE(x && x->sizes() == shape, "linear: the gradient of the weight needs x ",
                      at::IntArrayRef(shape));
    TORCH_CHECK_TYPE(x->scalar_type() == kind, "linear: x must be ", kind, " as grad is, not ",
                     x->scalar_type());
    const auto x_rows = rows_of(*x, in_float32);
    if (is_ours && x->numel() > 0) {
      std::tie(for_weight, for_bias) = for_scalar(
          rows, [&](auto scalar) { return parameter_gradients<decltype(scalar)>(rows, x_rows); });
    } else {
      for_weight = rows.to(exact).t().mm(x_rows.to(exact)).to(weight.scalar_type());
    }
  }
  if (wanted[2] && !for_bias.defined()) {
    for_bias = rows.sum(0, false, exact).to(weight.scalar_type());
  }
  return {for_x, for_weight, wanted[2] ? for_bias : at::Tensor()};
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) {
  m.impl("linear", &linear_cpu);
  m.impl("linear_backward", &linear_backward_cpu);
}

}  // namespace convai_fast::linear
