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
void attend_all(const Arguments<Kept>& arguments, const std::vector<Run>& runs) {
  const auto kernel = CONVAI_FAST_DISPATCH(cached_attention_kernel<Kept>);
  const int64_t num_heads = arguments.num_kv_heads;
  const int64_t tasks = static_cast<int64_t>(runs.size()) * num_heads;
  // Runs differ in length, so that threads take tasks one by one.
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(scratch_size(arguments));
    for (int64_t task; begin < end && (task = next++) < tasks;) {
      kernel(arguments, runs[task / num_heads], task % num_heads, scratch.data());
    }
  });
}

at::Tensor cached_attention_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                at::Tensor& keys, at::Tensor& values, const at::Tensor& slots,
                                const at::Tensor& offsets, const at::Tensor& lengths) {
  for (const auto& [x, name] : {std::pair{&q, "q"}, {&k, "k"}, {&v, "v"}}) {
    TORCH_CHECK_TYPE(x->scalar_type() == at::kFloat, "cached_attention: ", name,
                     " must be float32, not ", x->scalar_type());
  }
  const auto kept = keys.scalar_type();
  TORCH_CHECK_TYPE(kept == at::kFloat || kept == at::kBFloat16,
                   "cached_attention: keys must be float32 or bfloat16, not ", kept);
  check_tensor(keys, "cached_attention: keys", kept, 5);
  check_tensor(values, "cached_attention: values", kept, 4);
  const int64_t num_kv_heads = keys.size(1), head_dim = keys.size(3), capacity = values.size(2);
  TORCH_CHECK_VALUE(
      q.dim() == 3 && k.dim() == 3 && k.sizes() == v.sizes() && k.size(0) == q.size(0) &&
          k.size(1) == num_kv_heads && k.size(2) == head_dim && q.size(2) == head_dim &&
          num_kv_heads > 0 && q.size(1) % num_kv_heads == 0 && keys.size(4) == kPanel &&
          keys.size(2) * kPanel == capacity && capacity % kCapacityMultiple == 0 &&
          values.size(0) == keys.size(0) && values.size(1) == num_kv_heads &&
          values.size(3) % kCapacityMultiple == 0 && values.size(3) >= head_dim,
      "cached_attention: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(), ", keys ",
      keys.sizes(), " and values ", values.sizes(), " do not fit each other");
  const auto runs = check_runs(slots, offsets, lengths, q.size(0), keys.size(0), capacity);
  const auto queries = with_dense_heads(q), new_keys = with_dense_heads(k),
             new_values = with_dense_heads(v);
  auto out = at::empty(q.sizes(), q.options());
  const auto attend_as = [&](auto kept_scalar) {
    using Kept = decltype(kept_scalar);
    attend_all<Kept>({.q = heads_of<const float>(queries),
                      .k = heads_of<const float>(new_keys),
                      .v = heads_of<const float>(new_values),
                      .keys = static_cast<Kept*>(keys.mutable_data_ptr()),
                      .values = static_cast<Kept*>(values.mutable_data_ptr()),
                      .out = heads_of<float>(out),
                      .num_kv_heads = num_kv_heads,
                      .group = q.size(1) / num_kv_heads,
                      .value_dim = values.size(3),
                      .capacity = capacity},
                     runs);
  };
  if (kept == at::kBFloat16) {
    attend_as(simd::BFloat16{});
  } else {
    attend_as(float{});
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) { m.impl("cached_attention", &cached_attention_cpu); }

}  // namespace convai_fast::cached_attention
