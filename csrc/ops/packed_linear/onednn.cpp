#include "ops/packed_linear/onednn.h"

#include <ATen/Context.h>
#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>

#include "simd/isa.h"

namespace convai_fast::packed_linear {
namespace {

#if CONVAI_FAST_X86 && defined(CPUBLAS_BRGEMM_F32F32F32) && defined(CPUBLAS_BRGEMM_BF16BF16F32) && \
    defined(CPUBLAS_BRGEMM_U8I8I32)
#define CONVAI_FAST_ONEDNN 1
#else
#define CONVAI_FAST_ONEDNN 0
#endif

#if CONVAI_FAST_ONEDNN

// With the types of torch's own interface.
const float* as_torch(const float* x) { return x; }
const unsigned char* as_torch(const uint8_t* x) { return x; }
const signed char* as_torch(const int8_t* x) { return x; }
const at::BFloat16* as_torch(const simd::BFloat16* x) {
  return reinterpret_cast<const at::BFloat16*>(x);
}

// Whether the processor multiplies the format in instructions of its own: without them oneDNN
// converts, which our loops do faster.
template <typename Scalar>
bool has_instructions() {
  if constexpr (std::is_same_v<Scalar, simd::BFloat16>) return __builtin_cpu_supports("avx512bf16");
  if constexpr (std::is_same_v<Scalar, int8_t>) return __builtin_cpu_supports("avx512vnni");
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// A torch may be built without them.
template <typename Scalar>
bool they_run() {
  using F = Format<Scalar>;
  const typename F::Activation x[F::kTogether] = {};
  const Scalar block[kBlock * F::kTogether] = {};
  typename F::Sum sums[kBlock];
  try {
    onednn_product<Scalar>({.data = x, .stride = F::kTogether}, 1, block, F::kTogether, sums);
    onednn_release();
  } catch (const c10::Error&) {
    return false;
  }
  return true;
}

#endif

}  // namespace

template <typename Scalar>
bool onednn_multiplies() {
#if CONVAI_FAST_ONEDNN
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool is_there =
      simd::current_isa() == simd::best_isa() && has_instructions<Scalar>() && they_run<Scalar>();
  return is_there;
#else
  return false;
#endif
}

template <typename Scalar>
std::string onednn_instructions() {
  const auto has = [](const char* name) {
    return at::cpu::get_cpu_capabilities().at(name).toBool();
  };
  if constexpr (std::is_same_v<Scalar, simd::BFloat16>) {
    return has("amx_bf16") ? "AMX" : "AVX512-BF16";
  } else if constexpr (std::is_same_v<Scalar, int8_t>) {
    return has("amx_int8") ? "AMX" : "AVX512-VNNI";
  } else {
    return has("avx512_f") ? "AVX-512" : "AVX2";
  }
}

template <typename Scalar>
void onednn_part(const typename Format<Scalar>::Activation* x, int64_t stride, int64_t rows,
                 const Scalar* block, int64_t features, bool add,
                 typename Format<Scalar>::Sum* sums, int64_t sums_stride) {
#if CONVAI_FAST_ONEDNN
  constexpr bool kIsInterleaved = Format<Scalar>::kTogether > 1;
  at::native::cpublas::brgemm(rows, kBlock, features, stride, kBlock, sums_stride, add, as_torch(x),
                              as_torch(block), sums, kIsInterleaved);
#endif
}

template <typename Scalar>
void onednn_product(const Rows<Scalar>& x, int64_t rows, const Scalar* block,
                    int64_t padded_features, typename Format<Scalar>::Sum* sums) {
  constexpr int64_t kPart = simd::features_of_part<Scalar>();
  for (int64_t first = 0; first < padded_features; first += kPart) {
    onednn_part<Scalar>(x.data + first, x.stride, rows, block + first * kBlock,
                        std::min(kPart, padded_features - first), first > 0, sums, kBlock);
  }
}

void onednn_release() {
#if CONVAI_FAST_ONEDNN
  at::native::cpublas::brgemm_release();
#endif
}

#define CONVAI_FAST_PRODUCT(Scalar)                                                               \
  template bool onednn_multiplies<Scalar>();                                                      \
  template std::string onednn_instructions<Scalar>();                                             \
  template void onednn_part<Scalar>(const Format<Scalar>::Activation*, int64_t, int64_t,          \
                                    const Scalar*, int64_t, bool, Format<Scalar>::Sum*, int64_t); \
  template void onednn_product<Scalar>(const Rows<Scalar>&, int64_t, const Scalar*, int64_t,      \
                                       Format<Scalar>::Sum*);
CONVAI_FAST_PRODUCT(float)
CONVAI_FAST_PRODUCT(simd::BFloat16)
CONVAI_FAST_PRODUCT(int8_t)
#undef CONVAI_FAST_PRODUCT

}  // namespace convai_fast::packed_linear
