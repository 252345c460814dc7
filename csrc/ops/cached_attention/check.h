// What `cached_attention` is given, checked.
#pragma once

#include <string>
#include <vector>

#include "ops/cached_attention/arguments.h"
#include "ops/check.h"

namespace convai_fast::cached_attention {

// The new tokens of each sequence, or what is wrong with them.
inline std::vector<Run> check_runs(const std::string& op, const at::Tensor& slots,
                                   const at::Tensor& offsets, const at::Tensor& lengths,
                                   int64_t tokens, int64_t num_slots, int64_t capacity) {
  for (const auto& [table, name] :
       {std::pair{&slots, "slots"}, {&offsets, "offsets"}, {&lengths, "lengths"}}) {
    check_tensor(*table, (op + ": " + name).c_str(), at::kLong, 1);
    TORCH_CHECK_VALUE(table->is_cpu(), op, ": ", name, " must be on the CPU");
  }
  const int64_t num_runs = slots.size(0);
  TORCH_CHECK_VALUE(offsets.size(0) == num_runs + 1 && lengths.size(0) == num_runs, op, ": ",
                    num_runs, " slots need as many lengths and one offset ", "more, not ",
                    lengths.size(0), " and ", offsets.size(0));
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(offset[0] == 0 && offset[num_runs] == tokens, op,
                    ": offsets must lead from 0 to the number of tokens, ", tokens);
  std::vector<Run> runs(num_runs);
  std::vector<bool> used(num_slots);
  for (int64_t i = 0; i < num_runs; ++i) {
    const Run run{.slot = slots.const_data_ptr<int64_t>()[i],
                  .first = offset[i],
                  .end = offset[i + 1],
                  .length = lengths.const_data_ptr<int64_t>()[i],
                  .query = offset[i],
                  .out = offset[i]};
    TORCH_CHECK_INDEX(run.slot >= 0 && run.slot < num_slots && !used[run.slot], op, ": sequence ",
                      i, " has slot ", run.slot, ", but there are ", num_slots,
                      " and each may have one sequence");
    TORCH_CHECK_INDEX(
        run.first <= run.end && run.length >= 0 && run.end - run.first <= capacity - run.length, op,
        ": sequence ", i, " has ", run.end - run.first, " tokens after ", run.length,
        ", but the cache holds ", capacity);
    used[run.slot] = true;
    runs[i] = run;
  }
  return runs;
}

// Keys and values [slots, num_kv_heads, ...] as arguments.h has them; the capacity.
inline int64_t check_cache(const std::string& op, const at::Tensor& keys, const at::Tensor& values,
                           int64_t head_dim) {
  const auto kept = keys.scalar_type();
  TORCH_CHECK_TYPE(kept == at::kFloat || kept == at::kBFloat16, op,
                   ": keys must be float32 or bfloat16, not ", kept);
  check_tensor(keys, (op + ": keys").c_str(), kept, 6);
  check_tensor(values, (op + ": values").c_str(), kept, 6);
  const int64_t together = kept == at::kFloat ? 1 : 2, capacity = keys.size(2) * kBlock;
  const int64_t dims = simd::round_up(head_dim, together) / together;
  TORCH_CHECK_VALUE(keys.size(3) == dims && keys.size(4) == kBlock && keys.size(5) == together, op,
                    ": keys ", keys.sizes(), " must be [slots, num_kv_heads, capacity / 64, ", dims,
                    ", 64, ", together, "] for heads of ", head_dim);
  TORCH_CHECK_VALUE(values.size(0) == keys.size(0) && values.size(1) == keys.size(1) &&
                        values.size(2) == simd::round_up(head_dim, kBlock) / kBlock &&
                        values.size(3) == capacity / together && values.size(4) == kBlock &&
                        values.size(5) == together,
                    op, ": values ", values.sizes(), " must be [slots, num_kv_heads, ",
                    simd::round_up(head_dim, kBlock) / kBlock, ", ", capacity / together, ", 64, ",
                    together, "] for keys ", keys.sizes());
  return capacity;
}

}  // namespace convai_fast::cached_attention
