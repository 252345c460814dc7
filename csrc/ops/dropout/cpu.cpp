#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/dropout/dropout.h"

#define CONVAI_FAST_KERNEL "ops/dropout/cpu_kernel.h"
#include "simd/each_isa.h"

namespace convai_fast::dropout {
namespace {

constexpr int64_t kGroup = 64;           // elements of the 16 blocks that are drawn at once
constexpr int64_t kGroupsPerTask = 512;  // fewer are not worth a second thread

template <typename Scalar>
void fill(const at::Tensor& x, at::Tensor& out, const Dropout& dropout) {
  const auto kernel = CONVAI_FAST_DISPATCH(dropout_kernel<Scalar>);
  const auto* source = static_cast<const Scalar*>(x.const_data_ptr());
  auto* target = static_cast<Scalar*>(out.mutable_data_ptr());
  const int64_t count = x.numel();
  at::parallel_for(0, (count + kGroup - 1) / kGroup, kGroupsPerTask,
                   [&](int64_t begin, int64_t end) {
                     kernel(dropout, source, target, begin * kGroup, std::min(count, end * kGroup));
                   });
}

at::Tensor dropout_cpu(const at::Tensor& x, double p, const at::Tensor& seed) {
  const auto kind = x.scalar_type();
  TORCH_CHECK_TYPE(at::isFloatingType(kind), "dropout: x must be floating-point numbers, not ",
                   kind);
  if (kind != at::kFloat && kind != at::kBFloat16) {
    return dropout_cpu(x.to(at::kFloat), p, seed).to(kind);
  }
  check_tensor(seed, "dropout: seed", at::kLong, 0);
  const auto contiguous = x.contiguous();
  auto out = at::empty(x.sizes(), x.options());
  const Dropout dropout(p, static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()));
  for_scalar(x, [&](auto scalar) { fill<decltype(scalar)>(contiguous, out, dropout); });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) { m.impl("dropout", &dropout_cpu); }

}  // namespace convai_fast::dropout
