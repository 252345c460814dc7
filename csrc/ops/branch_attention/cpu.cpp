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

// q [tokens, num_heads, head_dim], and k and v [tokens, num_kv_heads, head_dim].
void check_qkv(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const auto kind = q.scalar_type();
  TORCH_CHECK_TYPE(at::isFloatingType(kind) && k.scalar_type() == kind && v.scalar_type() == kind,
                   "branch_attention: q, k and v must be floating-point numbers of one type, not ",
                   kind, ", ", k.scalar_type(), " and ", v.scalar_type());
  TORCH_CHECK_VALUE(
      q.dim() == 3 && k.dim() == 3 && k.sizes() == v.sizes() && q.size(0) == k.size(0) &&
          q.size(2) == k.size(2) && q.size(2) > 0 && k.size(1) > 0 && q.size(1) > 0 &&
          q.size(1) % k.size(1) == 0,
      "branch_attention: q must be [tokens, num_heads, head_dim], and k and v "
      "[tokens, num_kv_heads, head_dim], where num_heads is a multiple of num_kv_heads, "
      "not ",
      q.sizes(), ", ", k.sizes(), " and ", v.sizes());
}

Dropout dropout_of(double p, const std::optional<at::Tensor>& seed) {
  if (p == 0) return {0, 0};
  TORCH_CHECK_VALUE(seed.has_value(), "branch_attention: dropout needs a seed");
  check_tensor(*seed, "branch_attention: seed", at::kLong, 0);
  TORCH_CHECK_VALUE(seed->is_cpu(), "branch_attention: seed must be on the CPU");
  return {p, static_cast<uint64_t>(*seed->const_data_ptr<int64_t>())};
}

// A row's head of keys is computed by one thread, so that nothing depends on their number.
template <typename Scalar>
void attend_all(const Arguments<Scalar>& arguments, const Plan& plan, bool backward) {
  const auto kernel = backward ? CONVAI_FAST_DISPATCH(backward_kernel<Scalar>)
                               : CONVAI_FAST_DISPATCH(forward_kernel<Scalar>);
  const int64_t num_heads = arguments.num_kv_heads;
  const int64_t tasks = static_cast<int64_t>(plan.rows.size()) * num_heads;
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
      kernel(arguments, plan.rows[task / num_heads], task % num_heads, memory);
    }
  });
}

// What the operator was given and gives; the backward pass alone has the gradients.
struct Tensors {
  at::Tensor q, k, v, out, logsumexp, grad_out, grad_q, grad_k, grad_v;
};

template <typename Scalar>
void attend_as(const Tensors& t, const Dropout& dropout, const Plan& plan) {
  attend_all<Scalar>({.q = heads_of<const Scalar>(t.q),
                      .k = heads_of<const Scalar>(t.k),
                      .v = heads_of<const Scalar>(t.v),
                      .out = heads_of<Scalar>(t.out),
                      .logsumexp = t.logsumexp.data_ptr<float>(),
                      .grad_out = heads_of<const Scalar>(t.grad_out),
                      .grad_q = heads_of<Scalar>(t.grad_q),
                      .grad_k = heads_of<Scalar>(t.grad_k),
                      .grad_v = heads_of<Scalar>(t.grad_v),
                      .tokens = t.q.size(0),
                      .num_kv_heads = t.k.size(1),
                      .group = t.q.size(1) / t.k.size(1),
                      .dropout = dropout},
                     plan, t.grad_out.defined());
}

void attend(const Tensors& tensors, const Dropout& dropout, const Plan& plan) {
  for_scalar(tensors.q, [&](auto scalar) { attend_as<decltype(scalar)>(tensors, dropout, plan); });
}

// What the kernel reads `x` as: other numbers than its own as float32, in which it computes.
at::Tensor readable(const at::Tensor& x) {
  const auto kind = x.scalar_type();
  return with_dense_heads(kind == at::kFloat || kind == at::kBFloat16 ? x : x.to(at::kFloat));
}

std::tuple<at::Tensor, at::Tensor> branch_attention_cpu(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& offsets,
    const at::Tensor& branch_ids, double dropout_p, const std::optional<at::Tensor>& seed,
    const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
    const std::optional<at::Tensor>&, int64_t, int64_t) {
  check_qkv(q, k, v);
  const auto plan = plan_of(offsets, branch_ids, q.size(0));
  const auto dropout = dropout_of(dropout_p, seed);
  Tensors t{.q = readable(q), .k = readable(k), .v = readable(v)};
  t.out = at::empty(q.sizes(), t.q.options());
  t.logsumexp = at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
  attend(t, dropout, plan);
  return {t.out.to(q.scalar_type()), t.logsumexp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> branch_attention_backward_cpu(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out, const at::Tensor& logsumexp, const at::Tensor& offsets,
    const at::Tensor& branch_ids, double dropout_p, const std::optional<at::Tensor>& seed) {
  check_qkv(q, k, v);
  const auto kind = q.scalar_type();
  TORCH_CHECK_TYPE(grad_out.scalar_type() == kind && out.scalar_type() == kind,
                   "branch_attention: grad_out and out must be ", kind, ", not ",
                   grad_out.scalar_type(), " and ", out.scalar_type());
  check_tensor(logsumexp, "branch_attention: logsumexp", at::kFloat, 2);
  TORCH_CHECK_VALUE(grad_out.sizes() == q.sizes() && out.sizes() == q.sizes() &&
                        logsumexp.size(0) == q.size(1) && logsumexp.size(1) == q.size(0),
                    "branch_attention: grad_out ", grad_out.sizes(), ", q ", q.sizes(), ", out ",
                    out.sizes(), " and logsumexp ", logsumexp.sizes(), " do not fit each other");
  const auto plan = plan_of(offsets, branch_ids, q.size(0));
  const auto dropout = dropout_of(dropout_p, seed);
  Tensors t{.q = readable(q),
            .k = readable(k),
            .v = readable(v),
            .out = readable(out),
            .logsumexp = logsumexp,
            .grad_out = readable(grad_out)};
  t.grad_q = at::empty(q.sizes(), t.q.options());
  t.grad_k = at::empty(k.sizes(), t.q.options());
  t.grad_v = at::empty(v.sizes(), t.q.options());
  attend(t, dropout, plan);
  return {t.grad_q.to(kind), t.grad_k.to(kind), t.grad_v.to(kind)};
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) {
  m.impl("branch_attention", &branch_attention_cpu);
  m.impl("branch_attention_backward", &branch_attention_backward_cpu);
}

}  // namespace convai_fast::branch_attention
