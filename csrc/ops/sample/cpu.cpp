#include <ATen/Parallel.h>
#include <torch/library.h>

#include <limits>
#include <optional>

#include "ops/sample/check.h"
#include "ops/sample/cpu_kernel.h"

namespace convai_fast::sample {
namespace {

// Below this many logits a second thread costs more than it saves.
constexpr int64_t kLogitsPerTask = 16384;

// The row as contiguous float32, in `buffer` unless it is that already.
const float* float_row(const at::Tensor& logits, int64_t row, float* buffer) {
  const int64_t offset = row * logits.stride(0), stride = logits.stride(1), size = logits.size(1);
  const auto convert = [&]<typename Logit>(const Logit* source) -> const float* {
    if (stride == 1) {
      for (int64_t i = 0; i < size; ++i) buffer[i] = simd::to_float(source[i]);
    } else {
      for (int64_t i = 0; i < size; ++i) buffer[i] = simd::to_float(source[i * stride]);
    }
    return buffer;
  };
  const void* data = logits.const_data_ptr();
  if (logits.scalar_type() == at::kFloat) {
    const float* source = static_cast<const float*>(data) + offset;
    return stride == 1 ? source : convert(source);
  }
  if (logits.scalar_type() == at::kBFloat16) {
    return convert(static_cast<const simd::BFloat16*>(data) + offset);
  }
  return convert(static_cast<const simd::Half*>(data) + offset);
}

// A thread keeps its scratch from call to call, for fresh memory costs more than a row, unless the
// vocabulary is extraordinary.
const Scratch& thread_scratch(int64_t vocab_size) {
  constexpr int64_t kMostKept = 1 << 18;
  static thread_local std::optional<Scratch> scratch;
  if (!scratch || scratch->vocab_size() < vocab_size || scratch->vocab_size() > kMostKept) {
    scratch.emplace(vocab_size);
  }
  return *scratch;
}

Result sample_cpu(const at::Tensor& logits, const at::Tensor& temperature, const at::Tensor& top_k,
                  const at::Tensor& top_p, const at::Tensor& min_p, const at::Tensor& seeds,
                  const at::Tensor& steps, bool return_logprobs) {
  check_arguments({.logits = logits,
                   .temperature = temperature,
                   .top_k = top_k,
                   .top_p = top_p,
                   .min_p = min_p,
                   .seeds = seeds,
                   .steps = steps});
  auto result = allocate(logits, return_logprobs);
  int64_t* token_ids = std::get<0>(result).mutable_data_ptr<int64_t>();
  float* logprobs = std::get<1>(result).mutable_data_ptr<float>();
  const int64_t batch = logits.size(0), vocab_size = logits.size(1);
  TORCH_CHECK_VALUE(vocab_size <= std::numeric_limits<int32_t>::max() - kBlock,
                    "sample: a vocabulary of ", vocab_size, " tokens is too large");

  const auto parameter = [](const auto* values, const at::Tensor& tensor, int64_t row) {
    return values[row * stride_of(tensor)];
  };
  for (int64_t row = 0; row < batch; ++row) {
    const float value = parameter(temperature.const_data_ptr<float>(), temperature, row);
    TORCH_CHECK_VALUE(value >= 0, "sample: the temperature of row ", row,
                      " must be 0 or more, not ", value);
  }
  const int64_t rows_per_task =
      std::max<int64_t>(1, kLogitsPerTask / std::max<int64_t>(1, vocab_size));
  const auto sample_rows = [&](int64_t first, int64_t last) {
    const Scratch& scratch = thread_scratch(vocab_size);
    WeighedRow weighed(scratch, vocab_size);
    for (int64_t row = first; row < last; ++row) {
      if (!weighed.read(float_row(logits, row, scratch.logits()))) {
        token_ids[row] = -1;
        if (return_logprobs) logprobs[row] = std::numeric_limits<float>::quiet_NaN();
        continue;
      }
      token_ids[row] = sample_kernel(
          weighed,
          {
              .temperature = parameter(temperature.const_data_ptr<float>(), temperature, row),
              .top_k = parameter(top_k.const_data_ptr<int64_t>(), top_k, row),
              .top_p = parameter(top_p.const_data_ptr<float>(), top_p, row),
              .min_p = parameter(min_p.const_data_ptr<float>(), min_p, row),
              .seed = static_cast<uint64_t>(parameter(seeds.const_data_ptr<int64_t>(), seeds, row)),
              .step = static_cast<uint64_t>(parameter(steps.const_data_ptr<int64_t>(), steps, row)),
          });
      if (return_logprobs) logprobs[row] = logprob(weighed, token_ids[row]);
    }
  };
  at::parallel_for(0, batch, rows_per_task, sample_rows);
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) { m.impl("sample", &sample_cpu); }

}  // namespace convai_fast::sample
