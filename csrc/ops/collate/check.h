// What the CPU and the CUDA version of `collate` check and allocate alike.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "ops/check.h"
#include "ops/collate/layout.h"

namespace convai_fast::collate {

using PaddedResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using SharedResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct Arguments {
  const at::Tensor &tokens, &utterance_offsets, &persona_ids, &history_ids, &candidate_ids, &plan,
      &layout;
  int64_t num_candidates;
  int64_t seq_len;            // of the padded layout
  const at::Tensor* offsets;  // of the shared-prefix layout, else null
  int64_t num_tokens, max_length;
};

inline const PlanRow* rows_of_plan(const at::Tensor& plan) {
  return reinterpret_cast<const PlanRow*>(plan.const_data_ptr<int64_t>());
}

inline const Layout& layout_of(const at::Tensor& layout) {
  return *reinterpret_cast<const Layout*>(layout.const_data_ptr<int64_t>());
}

// Its utterances, and the places of texts, lie within the store.
inline void check_layout(const at::Tensor& tensor, int64_t num_utterances) {
  check_tensor(tensor, "collate: layout", at::kLong, 1);
  TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.numel() == kLayoutNumbers, "collate: layout must be ",
                    kLayoutNumbers, " numbers on the CPU");
  const Layout& layout = layout_of(tensor);
  const int64_t turn = layout.persona_turn;
  const bool has_turn = layout.partner_begins && (turn == kFirstTurn || turn == kLastTurn);
  TORCH_CHECK_VALUE(turn == kNoTurn || has_turn, "collate: layout has no turn for a persona");
  const int64_t* numbers = tensor.const_data_ptr<int64_t>();
  TORCH_CHECK_INDEX(std::all_of(numbers + kFirstPiece, numbers + kLayoutNumbers,
                                [&](int64_t id) { return id >= 0 && id < num_utterances; }),
                    "collate: layout points outside the store");
}

// The plan is checked on the host: it is small, and its rows are where a caller's mistake would
// read outside the store. What only the store's arrays can tell is left to where they lie; on a GPU
// the ids in them are taken as they are, since a store is checked when it is opened.
inline void check_arguments(const Arguments& a) {
  const auto dtype = a.tokens.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kUInt16 || dtype == at::kInt,
                   "collate: tokens must be uint16 or int32, not ", dtype);
  check_tensor(a.tokens, "collate: tokens", dtype, 1);
  check_tensor(a.utterance_offsets, "collate: utterance_offsets", at::kLong, 1);
  check_tensor(a.persona_ids, "collate: persona_ids", at::kInt, 1);
  check_tensor(a.history_ids, "collate: history_ids", at::kInt, 1);
  check_tensor(a.candidate_ids, "collate: candidate_ids", at::kInt, 1);
  check_tensor(a.plan, "collate: plan", at::kLong, 2);
  TORCH_CHECK_VALUE(a.plan.is_cpu(), "collate: plan must be on the CPU");
  for (const auto* table :
       {&a.utterance_offsets, &a.persona_ids, &a.history_ids, &a.candidate_ids}) {
    TORCH_CHECK_VALUE(table->device() == a.tokens.device(), "collate: a table is on ",
                      table->device(), " and tokens on ", a.tokens.device());
  }
  TORCH_CHECK_VALUE(a.plan.size(1) == kPlanColumns, "collate: plan must have ", kPlanColumns,
                    " columns, not ", a.plan.size(1));
  check_layout(a.layout, a.utterance_offsets.numel() - 1);
  TORCH_CHECK_VALUE(a.num_candidates >= 0 && a.seq_len >= 0 && a.max_length >= 0,
                    "collate: num_candidates, seq_len and max_length must not be negative");
  if (a.offsets) {
    check_tensor(*a.offsets, "collate: offsets", at::kLong, 1);
    TORCH_CHECK_VALUE(a.offsets->is_cpu() && a.offsets->numel() == a.plan.size(0) + 1,
                      "collate: offsets must be on the CPU, one more than the rows of the plan");
    const auto* offsets = a.offsets->const_data_ptr<int64_t>();
    const int64_t last = a.plan.size(0);
    TORCH_CHECK_VALUE(offsets[0] == 0 && offsets[last] == a.num_tokens &&
                          std::is_sorted(offsets, offsets + last + 1),
                      "collate: offsets must rise from 0 to num_tokens ", a.num_tokens);
  }

  const auto within = [](int64_t first, int64_t count, const at::Tensor& table) {
    return first >= 0 && count >= 0 && count <= table.numel() - first;
  };
  const PlanRow* plan = rows_of_plan(a.plan);
  for (int64_t i = 0; i < a.plan.size(0); ++i) {
    const PlanRow& row = plan[i];
    TORCH_CHECK_INDEX(within(row.persona_first, row.persona_count, a.persona_ids) &&
                          row.persona_rotation >= 0 && row.persona_rotation <= row.persona_count &&
                          row.persona_kept >= 0 && row.persona_kept <= row.persona_count &&
                          within(row.history_first, row.history_count, a.history_ids) &&
                          row.history_skip >= 0 &&
                          (row.history_count > 0 || row.history_skip == 0) &&
                          within(row.candidate_first, row.candidate_count, a.candidate_ids),
                      "collate: row ", i, " of the plan points outside the store");
    TORCH_CHECK_VALUE(row.candidate_count <= a.num_candidates, "collate: row ", i, " has ",
                      row.candidate_count, " candidates, and num_candidates is ", a.num_candidates);
  }
}

// Pinned memory is the host's, for a device to read.
inline at::TensorOptions output_options(const Arguments& a, bool pin_memory) {
  const bool pinned = pin_memory && a.tokens.is_cpu() && at::hasCUDA();
  return a.tokens.options().dtype(at::kLong).pinned_memory(pinned);
}

// On the CPU straight from the allocator: of a small batch, four to six dispatches are a tenth.
inline at::Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (!options.device().is_cpu()) return at::empty(sizes, options);
  return at::Tensor(at::detail::empty_cpu(sizes, options));
}

inline PaddedResult allocate_padded(const Arguments& a, bool pin_memory) {
  const auto options = output_options(a, pin_memory);
  const int64_t batch = a.plan.size(0);
  const auto sequences = [&] { return allocate({batch, a.num_candidates, a.seq_len}, options); };
  return {sequences(), sequences(), sequences(), allocate({batch, a.num_candidates}, options)};
}

inline SharedResult allocate_shared(const Arguments& a, bool pin_memory) {
  const auto options = output_options(a, pin_memory);
  const int64_t batch = a.plan.size(0);
  const auto tokens = [&] { return allocate({a.num_tokens}, options); };
  return {tokens(), tokens(), tokens(),
          tokens(), tokens(), allocate({batch, a.num_candidates}, options)};
}

// The results' tensors in the order of the struct's pointers.
template <typename Output, typename Result>
Output pointers(const Result& result) {
  return std::apply(
      [](const auto&... tensors) {
        return Output{tensors.template mutable_data_ptr<int64_t>()...};
      },
      result);
}

template <typename Token>
Input<Token> input_of(const Arguments& a, const PlanRow* plan, const int64_t* offsets) {
  return {.tokens = static_cast<const Token*>(a.tokens.const_data_ptr()),
          .utterance_offsets = a.utterance_offsets.const_data_ptr<int64_t>(),
          .num_tokens = a.tokens.numel(),
          .num_utterances = a.utterance_offsets.numel() - 1,
          .persona_ids = a.persona_ids.const_data_ptr<int32_t>(),
          .history_ids = a.history_ids.const_data_ptr<int32_t>(),
          .candidate_ids = a.candidate_ids.const_data_ptr<int32_t>(),
          .plan = plan,
          .num_candidates = a.num_candidates,
          .seq_len = a.seq_len,
          .offsets = offsets,
          .max_length = a.max_length,
          .layout = layout_of(a.layout)};
}

// The operators themselves, but for what fills the outputs: kFill(arguments, result).
template <auto kFill>
PaddedResult collate_padded(const at::Tensor& tokens, const at::Tensor& utterance_offsets,
                            const at::Tensor& persona_ids, const at::Tensor& history_ids,
                            const at::Tensor& candidate_ids, const at::Tensor& plan,
                            const at::Tensor& layout, int64_t num_candidates, int64_t seq_len,
                            bool pin_memory) {
  const Arguments arguments{.tokens = tokens,
                            .utterance_offsets = utterance_offsets,
                            .persona_ids = persona_ids,
                            .history_ids = history_ids,
                            .candidate_ids = candidate_ids,
                            .plan = plan,
                            .layout = layout,
                            .num_candidates = num_candidates,
                            .seq_len = seq_len,
                            .offsets = nullptr,
                            .num_tokens = 0,
                            .max_length = seq_len};
  check_arguments(arguments);
  auto result = allocate_padded(arguments, pin_memory);
  kFill(arguments, result);
  return result;
}

template <auto kFill>
SharedResult collate_shared(const at::Tensor& tokens, const at::Tensor& utterance_offsets,
                            const at::Tensor& persona_ids, const at::Tensor& history_ids,
                            const at::Tensor& candidate_ids, const at::Tensor& plan,
                            const at::Tensor& layout, int64_t num_candidates,
                            const at::Tensor& offsets, int64_t num_tokens, int64_t max_length,
                            bool pin_memory) {
  const Arguments arguments{.tokens = tokens,
                            .utterance_offsets = utterance_offsets,
                            .persona_ids = persona_ids,
                            .history_ids = history_ids,
                            .candidate_ids = candidate_ids,
                            .plan = plan,
                            .layout = layout,
                            .num_candidates = num_candidates,
                            .seq_len = 0,
                            .offsets = &offsets,
                            .num_tokens = num_tokens,
                            .max_length = max_length};
  check_arguments(arguments);
  auto result = allocate_shared(arguments, pin_memory);
  kFill(arguments, result);
  return result;
}

}  // namespace convai_fast::collate
