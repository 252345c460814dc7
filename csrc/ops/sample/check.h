// What the CPU and the CUDA version of `sample` check and allocate alike.
#pragma once

#include <ATen/ops/empty.h>

#include "ops/check.h"

namespace convai_fast::sample {

using Result = std::tuple<at::Tensor, at::Tensor>;

struct Arguments {
  const at::Tensor &logits, &temperature, &top_k, &top_p, &min_p, &seeds, &steps;
};

// `logits` may have any strides; the parameters, one a row or one for all, may too.
inline void check_arguments(const Arguments& a) {
  TORCH_CHECK_VALUE(a.logits.dim() == 2, "sample: logits must be [batch, vocab_size], not ",
                    a.logits.sizes());
  const auto dtype = a.logits.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "sample: logits must be float32, bfloat16 or float16, not ", dtype);
  const int64_t batch = a.logits.size(0);
  TORCH_CHECK_VALUE(batch == 0 || a.logits.size(1) > 0, "sample: the vocabulary is empty");
  const auto check = [&](const at::Tensor& parameter, const char* name, at::ScalarType expected) {
    TORCH_CHECK_TYPE(parameter.scalar_type() == expected, "sample: ", name, " must be ", expected,
                     ", not ", parameter.scalar_type());
    TORCH_CHECK_VALUE(
        parameter.dim() == 1 && (parameter.size(0) == batch || parameter.size(0) == 1),
        "sample: ", name, " must have one value, or one a row, ", batch, ", not ",
        parameter.sizes());
    TORCH_CHECK_VALUE(parameter.device() == a.logits.device(), "sample: ", name, " is on ",
                      parameter.device(), " and logits on ", a.logits.device());
  };
  check(a.temperature, "temperature", at::kFloat);
  check(a.top_k, "top_k", at::kLong);
  check(a.top_p, "top_p", at::kFloat);
  check(a.min_p, "min_p", at::kFloat);
  check(a.seeds, "seeds", at::kLong);
  check(a.steps, "steps", at::kLong);
}

// From one row's value of a parameter to the next's.
inline int64_t stride_of(const at::Tensor& parameter) {
  return parameter.size(0) == 1 ? 0 : parameter.stride(0);
}

inline Result allocate(const at::Tensor& logits, bool return_logprobs) {
  const int64_t batch = logits.size(0);
  return {at::empty({batch}, logits.options().dtype(at::kLong)),
          at::empty({return_logprobs ? batch : 0}, logits.options().dtype(at::kFloat))};
}

}  // namespace convai_fast::sample
