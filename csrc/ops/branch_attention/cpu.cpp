#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <numeric>
#include <vector>

#include "ops/branch_attention/rows.h"

#define CONVAI_FAST_KERNEL "ops/branch_attention/cpu_kernel.h"
#include "ops/check.h"
#include "simd/each_isa.h"

namespace convai_fast::branch_attention {
namespace {

struct Plan {
  std::vector<Segment> segments;
  std::vector<Row> rows;  // the longest first
};

Plan plan_of(const at::Tensor& offsets, const at::Tensor& branch_ids, int64_t tokens) {
  for (const auto& [table, name] : {std::pair{&offsets, "branch_attention: offsets"},
                                    {&branch_ids, "branch_attention: branch_ids"}}) {
    check_tensor(*table, name, at::kLong, 1);
    TORCH_CHECK_VALUE(table->is_cpu(), name, " must be on the CPU");
  }
  const int64_t batch = offsets.size(0) - 1;
  TORCH_CHECK_VALUE(branch_ids.size(0) == tokens, "branch_attention: ", tokens,
                    " tokens need as many branch_ids, not ", branch_ids.size(0));
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  const int64_t* branch = branch_ids.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(batch >= 0 && offset[0] == 0 && offset[batch] == tokens,
                    "branch_attention: offsets must lead from 0 to the number of tokens, ", tokens);
  Plan plan;
  std::vector<size_t> first_segments;
  for (int64_t r = 0; r < batch; ++r) {
    TORCH_CHECK_VALUE(offset[r] <= offset[r + 1] && offset[r + 1] <= tokens,
                      "branch_attention: offsets must not decrease, but row ", r, " is ", offset[r],
                      " to ", offset[r + 1]);
    Row row;
    first_segments.push_back(plan.segments.size());
    plan.segments.push_back({.first = offset[r], .count = 0, .packed = 0});
    const auto close = [&] {
      const int64_t padded = round_up(plan.segments.back().count, kPanel);
      row.packed += padded;
      const int64_t prefix = round_up(plan.segments[first_segments.back()].count, kPanel);
      row.columns = std::max(row.columns, row.num_segments == 1 ? padded : prefix + padded);
    };
    int64_t current = 0;
    for (int64_t i = offset[r]; i < offset[r + 1]; ++i) {
      TORCH_CHECK_VALUE(branch[i] >= current, "branch_attention: the branch_ids of row ", r,
                        " must not be negative nor decrease, but token ", i, " has ", branch[i]);
      if (branch[i] > current) {
        close();
        current = branch[i];
        plan.segments.push_back({.first = i, .count = 0, .packed = row.packed});
        ++row.num_segments;
      }
      ++plan.segments.back().count;
    }
    close();
    plan.rows.push_back(row);
  }
  for (int64_t r = 0; r < batch; ++r) plan.rows[r].segments = &plan.segments[first_segments[r]];
  std::stable_sort(plan.rows.begin(), plan.rows.end(),
                   [](const auto& a, const auto& b) { return a.packed > b.packed; });
  return plan;
}

void check_qkv(const at::Tensor& qkv, int64_t num_heads) {
  const auto kind = qkv.scalar_type();
  TORCH_CHECK_TYPE(kind == at::kFloat || kind == at::kBFloat16,
                   "branch_attention: qkv must be float32 or bfloat16, not ", kind);
  TORCH_CHECK_VALUE(
      qkv.dim() == 2 && num_heads > 0 && qkv.size(1) > 0 && qkv.size(1) % (3 * num_heads) == 0,
      "branch_attention: qkv must be [tokens, 3 * num_heads * head_dim], not ", qkv.sizes(),
      " with ", num_heads, " heads");
}

Dropout dropout_of(double p, const std::optional<at::Tensor>& seed) {
  if (p == 0) return {0, 0};
  TORCH_CHECK_VALUE(seed.has_value(), "branch_attention: dropout needs a seed");
  check_tensor(*seed, "branch_attention: seed", at::kLong, 0);
  TORCH_CHECK_VALUE(seed->is_cpu(), "branch_attention: seed must be on the CPU");
  return {p, static_cast<uint64_t>(*seed->const_data_ptr<int64_t>())};
}

// A row's head is computed by one thread, so that nothing depends on their number.
template <typename Scalar>
void attend_all(const Arguments<Scalar>& arguments, const Plan& plan, bool backward) {
  const auto kernel = backward ? CONVAI_FAST_DISPATCH(backward_kernel<Scalar>)
                               : CONVAI_FAST_DISPATCH(forward_kernel<Scalar>);
  const int64_t tasks = static_cast<int64_t>(plan.rows.size()) * arguments.num_heads;
  int64_t scratch_size = 0;
  for (const Row& row : plan.rows) {
    scratch_size = std::max(scratch_size, Scratch(arguments, row).size());
  }
  // Rows differ in length, so that threads take tasks one by one.
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = at::empty({scratch_size}, at::kFloat);
    float* memory = scratch.template mutable_data_ptr<float>();
    for (int64_t task; begin < end && (task = next++) < tasks;) {
      kernel(arguments, plan.rows[task / arguments.num_heads], task % arguments.num_heads, memory);
    }
  });
}

void attend(const at::Tensor& qkv, const at::Tensor& out, const at::Tensor& logsumexp,
            const at::Tensor* grad_out, const at::Tensor* grad_qkv, int64_t num_heads,
            const Dropout& dropout, const Plan& plan) {
  const auto attend_as = [&](auto scalar) {
    using Scalar = decltype(scalar);
    const auto data = [](const at::Tensor* tensor) {
      return tensor ? static_cast<Scalar*>(tensor->data_ptr()) : nullptr;
    };
    attend_all<Scalar>({.qkv = data(&qkv),
                        .out = data(&out),
                        .logsumexp = logsumexp.data_ptr<float>(),
                        .grad_out = data(grad_out),
                        .grad_qkv = data(grad_qkv),
                        .tokens = qkv.size(0),
                        .num_heads = num_heads,
                        .head_dim = qkv.size(1) / (3 * num_heads),
                        .dropout = dropout},
                       plan, grad_out != nullptr);
  };
  if (qkv.scalar_type() == at::kFloat) {
    attend_as(float{});
  } else {
    attend_as(simd::BFloat16{});
  }
}

std::tuple<at::Tensor, at::Tensor> branch_attention_cpu(const at::Tensor& any_qkv,
                                                        const at::Tensor& offsets,
                                                        const at::Tensor& branch_ids,
                                                        int64_t num_heads, double dropout_p,
                                                        const std::optional<at::Tensor>& seed) {
  check_qkv(any_qkv, num_heads);
  const auto qkv = any_qkv.contiguous();
  const auto plan = plan_of(offsets, branch_ids, qkv.size(0));
  const auto dropout = dropout_of(dropout_p, seed);
  auto out = at::empty({qkv.size(0), qkv.size(1) / 3}, qkv.options());
  auto logsumexp = at::empty({num_heads, qkv.size(0)}, qkv.options().dtype(at::kFloat));
  attend(qkv, out, logsumexp, nullptr, nullptr, num_heads, dropout, plan);
  return {out, logsumexp};
}

at::Tensor branch_attention_backward_cpu(const at::Tensor& any_grad_out, const at::Tensor& any_qkv,
                                         const at::Tensor& out, const at::Tensor& logsumexp,
                                         const at::Tensor& offsets, const at::Tensor& branch_ids,
                                         int64_t num_heads, double dropout_p,
                                         const std::optional<at::Tensor>& seed) {
  check_qkv(any_qkv, num_heads);
  const auto qkv = any_qkv.contiguous(), grad_out = any_grad_out.contiguous();
  const at::IntArrayRef shape = out.sizes();
  check_tensor(grad_out, "branch_attention: grad_out", qkv.scalar_type(), 2);
  check_tensor(out, "branch_attention: out", qkv.scalar_type(), 2);
  check_tensor(logsumexp, "branch_attention: logsumexp", at::kFloat, 2);
  TORCH_CHECK_VALUE(
      shape == grad_out.sizes() && shape[0] == qkv.size(0) && shape[1] * 3 == qkv.size(1) &&
          logsumexp.size(0) == num_heads && logsumexp.size(1) == qkv.size(0),
      "branch_attention: grad_out ", grad_out.sizes(), ", qkv ", qkv.sizes(), ", out ", shape,
      " and logsumexp ", logsumexp.sizes(), " do not fit each other");
  const auto plan = plan_of(offsets, branch_ids, qkv.size(0));
  const auto dropout = dropout_of(dropout_p, seed);
  auto grad_qkv = at::empty(qkv.sizes(), qkv.options());
  attend(qkv, out, logsumexp, &grad_out, &grad_qkv, num_heads, dropout, plan);
  return grad_qkv;
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) {
  m.impl("branch_attention", &branch_attention_cpu);
  m.impl("branch_attention_backward", &branch_attention_backward_cpu);
}

}  // namespace convai_fast::branch_attention
