#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/cached_attention/attend.h"
#include "ops/cached_attention/check.h"

namespace convai_fast::cached_attention {
namespace {

at::Tensor cached_attention_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                at::Tensor& keys, at::Tensor& values, const at::Tensor& slots,
                                const at::Tensor& offsets, const at::Tensor& lengths) {
  for (const auto& [x, name] : {std::pair{&q, "q"}, {&k, "k"}, {&v, "v"}}) {
    TORCH_CHECK_TYPE(x->scalar_type() == at::kFloat, "cached_attention: ", name,
                     " must be float32, not ", x->scalar_type());
  }
  TORCH_CHECK_VALUE(q.dim() == 3 && k.dim() == 3 && keys.dim() == 6 && k.sizes() == v.sizes() &&
                        k.size(0) == q.size(0) && k.size(2) == q.size(2) && k.size(1) > 0 &&
                        k.size(1) == keys.size(1) && q.size(1) % k.size(1) == 0 && q.size(2) > 0,
                    "cached_attention: q ", q.sizes(), " must be [tokens, num_heads, head_dim], ",
                    "k ", k.sizes(), " and v ", v.sizes(), " [tokens, num_kv_heads, head_dim], ",
                    "with the heads of keys ", keys.sizes());
  const int64_t capacity = check_cache("cached_attention", keys, values, q.size(2));
  const auto runs =
      check_runs("cached_attention", slots, offsets, lengths, q.size(0), keys.size(0), capacity);
  const auto queries = with_dense_heads(q), new_keys = with_dense_heads(k),
             new_values = with_dense_heads(v);
  auto out = at::empty(q.sizes(), q.options());
  for_scalar(keys, [&](auto kept) {
    using Kept = decltype(kept);
    attend<Kept>({.q = heads_of<const float>(queries),
                  .k = heads_of<const float>(new_keys),
                  .v = heads_of<const float>(new_values),
                  .keys = static_cast<Kept*>(keys.mutable_data_ptr()),
                  .values = static_cast<Kept*>(values.mutable_data_ptr()),
                  .out = heads_of<float>(out),
                  .num_kv_heads = k.size(1),
                  .group = q.size(1) / k.size(1),
                  .capacity = capacity},
                 runs);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) { m.impl("cached_attention", &cached_attention_cpu); }

}  // namespace convai_fast::cached_attention
