#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <vector>

#include "ops/cached_attention/arguments.h"

#define CONVAI_FAST_KERNEL "ops/cached_attention/cpu_kernel.h"
#include "ops/check.h"
#include "simd/each_isa.h"

namespace convai_fast::cached_attention {
namespace {

std::vector<Run> check_runs(const at::Tensor& slots, const at::Tensor& offsets,
                            const at::Tensor& lengths, int64_t tokens, int64_t num_slots,
                            int64_t capacity) {
  for (const auto& [table, name] :
       {std::pair{&slots, "slots"}, {&offsets, "offsets"}, {&lengths, "lengths"}}) {
    check_tensor(*table, name, at::kLong, 1);
    TORCH_CHECK_VALUE(table->is_cpu(), "cached_attention: ", name, " must be on the CPU");
  }
  const int64_t num_runs = slots.size(0);
  TORCH_CHECK_VALUE(offsets.size(0) == num_runs + 1 && lengths.size(0) == num_runs,
                    "cached_attention: ", num_runs, " slots need as many lengths and one offset ",
                    "more, not ", lengths.size(0), " and ", offsets.size(0));
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(offset[0] == 0 && offset[num_runs] == tokens,
                    "cached_attention: offsets must lead from 0 to the number of tokens, ", tokens);
  std::vector<Run> runs(num_runs);
  std::vector<bool> used(num_slots);
  for (int64_t i = 0; i < num_runs; ++i) {
    const Run run{.slot = slots.const_data_ptr<int64_t>()[i],
                  .first = offset[i],
                  .end = offset[i + 1],
                  .length = lengths.const_data_ptr<int64_t>()[i]};
    TORCH_CHECK_INDEX(run.slot >= 0 && run.slot < num_slots && !used[run.slot],
                      "cached_attention: run ", i, " has slot ", run.slot, ", but there are ",
                      num_slots, " and each may have one run");
    TORCH_CHECK_INDEX(
        run.first <= run.end && run.length >= 0 && run.end - run.first <= capacity - run.length,
        "cached_attention: run ", i, " has ", run.end - run.first, " tokens after ", run.length,
        ", but the cache holds ", capacity);
    used[run.slot] = true;
    runs[i] = run;
  }
  return runs;
}

template <typename Kept>
void attend_all(const at::Tensor& qkv, at::Tensor& keys, at::Tensor& values, at::Tensor& out,
                const std::vector<Run>& runs) {
  const Arguments<Kept> arguments{.qkv = qkv.const_data_ptr<float>(),
                                  .keys = static_cast<Kept*>(keys.mutable_data_ptr()),
                                  .values = static_cast<Kept*>(values.mutable_data_ptr()),
                                  .out = out.mutable_data_ptr<float>(),
                                  .num_heads = keys.size(1),
                                  .head_dim = keys.size(3),
                                  .value_dim = values.size(3),
                                  .capacity = values.size(2)};
  const auto kernel = CONVAI_FAST_DISPATCH(cached_attention_kernel<Kept>);
  const int64_t tasks = static_cast<int64_t>(runs.size()) * arguments.num_heads;
  // Runs differ in length, so that threads take tasks one by one.
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(scratch_size(arguments));
    for (int64_t task; begin < end && (task = next++) < tasks;) {
      kernel(arguments, runs[task / arguments.num_heads], task % arguments.num_heads,
             scratch.data());
    }
  });
}

at::Tensor cached_attention_cpu(const at::Tensor& qkv, at::Tensor& keys, at::Tensor& values,
                                const at::Tensor& slots, const at::Tensor& offsets,
                                const at::Tensor& lengths) {
  check_tensor(qkv, "cached_attention: qkv", at::kFloat, 2);
  const auto kept = keys.scalar_type();
  TORCH_CHECK_TYPE(kept == at::kFloat || kept == at::kBFloat16,
                   "cached_attention: keys must be float32 or bfloat16, not ", kept);
  check_tensor(keys, "cached_attention: keys", kept, 5);
  check_tensor(values, "cached_attention: values", kept, 4);
  const int64_t num_heads = keys.size(1), head_dim = keys.size(3), capacity = values.size(2);
  TORCH_CHECK_VALUE(keys.size(4) == kPanel && keys.size(2) * kPanel == capacity &&
                        capacity % kCapacityMultiple == 0 && values.size(0) == keys.size(0) &&
                        values.size(1) == num_heads && values.size(3) % kCapacityMultiple == 0 &&
                        values.size(3) >= head_dim && qkv.size(1) == 3 * num_heads * head_dim,
                    "cached_attention: qkv ", qkv.sizes(), ", keys ", keys.sizes(), " and values ",
                    values.sizes(), " do not fit each other");
  const auto runs = check_runs(slots, offsets, lengths, qkv.size(0), keys.size(0), capacity);
  auto out = at::empty({qkv.size(0), num_heads * head_dim}, qkv.options());
  if (kept == at::kBFloat16) {
    attend_all<simd::BFloat16>(qkv, keys, values, out, runs);
  } else {
    attend_all<float>(qkv, keys, values, out, runs);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) { m.impl("cached_attention", &cached_attention_cpu); }

}  // namespace convai_fast::cached_attention
