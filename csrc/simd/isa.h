// Which instruction set the CPU kernels use, decided once at run time, so that one build runs on
// any x86-64. CONVAI_FAST_ISA=portable|avx2|avx512 lowers it (never raises it), for tests and
// debugging; avx512_bf16 is AVX-512 with its instructions for bfloat16 and for int8 (BF16, VNNI).
#pragma once

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define CONVAI_FAST_X86 1
#else
#define CONVAI_FAST_X86 0
#endif

namespace convai_fast::simd {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

inline const char* isa_name(Isa isa) {
  return isa == Isa::kAvx512Bf16 ? "avx512_bf16"
         : isa == Isa::kAvx512   ? "avx512"
         : isa == Isa::kAvx2     ? "avx2"
                                 : "portable";
}

inline Isa best_isa() {
  Isa best = Isa::kPortable;
#if CONVAI_FAST_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt")) {
    best = Isa::kAvx2;
  }
  if (best == Isa::kAvx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    best = Isa::kAvx512;
  }
  if (best == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("avx512vnni")) {
    best = Isa::kAvx512Bf16;
  }
#endif
  return best;
}

inline Isa detect_isa() {
  const Isa best = best_isa();
  if (const char* wanted = std::getenv("CONVAI_FAST_ISA")) {
    for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
      if (isa < best && std::strcmp(wanted, isa_name(isa)) == 0) return isa;
    }
  }
  return best;
}

inline Isa current_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

}  // namespace convai_fast::simd
