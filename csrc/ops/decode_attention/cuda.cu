#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ops/decode_attention/check.h"
#include "ops/decode_attention/cuda_kernel.cuh"
#include "ops/for_float.h"

namespace convai_fast::decode_attention {
namespace {

// How many of the largest blocks an SM has registers for. Left to itself, the compiler makes room
// for more, and loads wait for one another.
template <typename Scalar, int kQueries, bool kAligned>
constexpr int kMinBlocks = sizeof(Scalar) > 2 || !kAligned || kQueries == 8 ? 1
                           : kQueries == 1                                  ? 3
                                                                            : 2;

template <typename Scalar, int kQueries, bool kAligned>
__global__ void __launch_bounds__(kMaxWarps * 32, (kMinBlocks<Scalar, kQueries, kAligned>))
    decode_attention_kernel(const Input<Scalar> in) {
  extern __shared__ float shared[];
  decode_block<Scalar, kQueries, kAligned>(in, shared);
}

template <typename Scalar>
void launch(const Input<Scalar>& in, int64_t rows) {
  for_variant(in, [&]<int kQueries, bool kAligned>() {
    const Grid grid = grid_of(in, rows, kQueries);
    decode_attention_kernel<Scalar, kQueries, kAligned>
        <<<dim3(grid.x, grid.y), grid.threads, grid.shared_bytes,
           c10::cuda::getCurrentCUDAStream()>>>(in);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

template <typename Scalar>
Heads<Scalar> heads_of(const at::Tensor& x) {
  return {static_cast<Scalar*>(x.data_ptr()), x.stride(0), static_cast<int>(x.stride(1))};
}

template <typename Scalar>
Cache<Scalar> cache_of(const at::Tensor& x) {
  return {x.mutable_data_ptr<Scalar>(), x.stride(0), static_cast<int>(x.stride(1)),
          static_cast<int>(x.stride(2))};
}

PerRow per_row(const at::Tensor& x) { return {x.const_data_ptr<int64_t>(), x.stride(0)}; }

// Copied only where a head's features do not lie side by side.
at::Tensor with_dense_features(const at::Tensor& x) {
  return x.size(2) == 1 || x.stride(2) == 1 ? x : x.contiguous();
}

at::Tensor decode_attention_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const at::Tensor& keys, const at::Tensor& values,
                                 const at::Tensor& slots, const at::Tensor& lengths) {
  check_arguments(
      {.q = q, .k = k, .v = v, .keys = keys, .values = values, .slots = slots, .lengths = lengths});
  const c10::cuda::CUDAGuard guard(q.device());
  const int64_t rows = q.size(0);
  const at::Tensor out = at::empty_like(q, at::MemoryFormat::Contiguous);
  if (rows == 0) return out;
  const at::Tensor queries = with_dense_features(q), new_keys = with_dense_features(k),
                   new_values = with_dense_features(v);
  for_float(q, [&]<typename Scalar>(Scalar) {
    launch(Input<Scalar>{.q = heads_of<const Scalar>(queries),
                         .k = heads_of<const Scalar>(new_keys),
                         .v = heads_of<const Scalar>(new_values),
                         .keys = cache_of<Scalar>(keys),
                         .values = cache_of<Scalar>(values),
                         .slots = per_row(slots),
                         .lengths = per_row(lengths),
                         .out = heads_of<Scalar>(out),
                         .num_slots = keys.size(0),
                         .capacity = keys.size(1),
                         .num_kv_heads = static_cast<int>(k.size(1)),
                         .group = static_cast<int>(q.size(1) / k.size(1)),
                         .head_dim = static_cast<int>(q.size(2)),
                         .log_lanes = log_lanes_for(q.size(2)),
                         .scale = scale_for(q.size(2))},
           rows);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CUDA, m) { m.impl("decode_attention", &decode_attention_cuda); }

}  // namespace convai_fast::decode_attention
