// What `decode_attention` is given, checked.
#pragma once

#include "ops/check.h"

namespace convai_fast::decode_attention {

constexpr int64_t kMaxHeadDim = 256;

struct Arguments {
  const at::Tensor &q, &k, &v, &keys, &values, &slots, &lengths;
};

inline void check_arguments(const Arguments& a) {
  const auto dtype = a.q.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "decode_attention: q must be float32, bfloat16 or float16, not ", dtype);
  TORCH_CHECK_VALUE(a.q.dim() == 3 && a.k.dim() == 3,
                    "decode_attention: q must be [rows, num_heads, head_dim], and k and v with "
                    "num_kv_heads, not ",
                    a.q.sizes(), " and ", a.k.sizes());
  const int64_t rows = a.q.size(0), head_dim = a.q.size(2), num_kv_heads = a.k.size(1);
  TORCH_CHECK_VALUE(0 < head_dim && head_dim <= kMaxHeadDim,
                    "decode_attention: head_dim must be 1 to ", kMaxHeadDim, " on CUDA, not ",
                    head_dim);
  TORCH_CHECK_VALUE(num_kv_heads > 0 && a.q.size(1) > 0 && a.q.size(1) % num_kv_heads == 0,
                    "decode_attention: ", a.q.size(1), " heads of queries cannot share ",
                    num_kv_heads, " of keys");
  const auto check = [&](const at::Tensor& x, const char* name, at::ScalarType expected,
                         at::IntArrayRef sizes) {
    TORCH_CHECK_TYPE(x.scalar_type() == expected, "decode_attention: ", name, " must be ", expected,
                     ", not ", x.scalar_type());
    TORCH_CHECK_VALUE(x.sizes() == sizes, "decode_attention: ", name, " must be ", sizes, ", not ",
                      x.sizes());
    TORCH_CHECK_VALUE(x.device() == a.q.device(), "decode_attention: ", name, " is on ", x.device(),
                      " and q on ", a.q.device());
  };
  check(a.k, "k", dtype, {rows, num_kv_heads, head_dim});
  check(a.v, "v", dtype, {rows, num_kv_heads, head_dim});
  TORCH_CHECK_VALUE(a.keys.dim() == 4,
                    "decode_attention: keys must be [num_slots, capacity, num_kv_heads, "
                    "head_dim], not ",
                    a.keys.sizes());
  const int64_t num_slots = a.keys.size(0), capacity = a.keys.size(1);
  check(a.keys, "keys", dtype, {num_slots, capacity, num_kv_heads, head_dim});
  check(a.values, "values", dtype, {num_slots, capacity, num_kv_heads, head_dim});
  constexpr int64_t kMost = 1 << 30;
  for (const int64_t x :
       {rows * num_kv_heads, capacity, a.q.stride(1), a.k.stride(1), a.v.stride(1),
        a.keys.stride(1), a.keys.stride(2), a.values.stride(1), a.values.stride(2)}) {
    TORCH_CHECK_VALUE(x <= kMost,
                      "decode_attention: on CUDA, rows, positions, and what lies between heads and "
                      "between positions, must be at most 2^30");
  }
  for (const auto& [x, name] : {std::pair{&a.keys, "keys"}, {&a.values, "values"}}) {
    TORCH_CHECK_VALUE(head_dim == 1 || x->stride(3) == 1, "decode_attention: a head's features in ",
                      name, " must lie side by side");
  }
  check(a.slots, "slots", at::kLong, {rows});
  check(a.lengths, "lengths", at::kLong, {rows});
}

}  // namespace convai_fast::decode_attention
