// Which instruction set the CPU kernels use, decided once at run time, so that one build runs on
// any x86-64. CONVAI_FAST_ISA=portable|avx2|avx512 lowers it (never raises it), for tests and
// debugging.
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

enum class Isa { kPortable, kAvx2, kAvx512 };

inline const char* isa_name(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "portable";
}

inline Isa detect_isa() {
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
#endif
  if (const char* wanted = std::getenv("CONVAI_FAST_ISA")) {
    for (Isa isa : {Isa::kPortable, Isa::kAvx2}) {
      if (isa < best && std::strcmp(wanted, isa_name(isa)) == 0) best = isa;
    }
  }
  return best;
}

inline Isa current_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

}  // namespace convai_fast::simd
