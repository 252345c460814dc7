// The one way from an operator to its kernels. A kernel's source is compiled once for each
// instruction set, in a namespace of its own, and the operator calls that of this processor:
//
//   #define CONVAI_FAST_KERNEL "ops/dropout/cpu_kernel.h"
//   #include "simd/each_isa.h"
//   ...
//   CONVAI_FAST_DISPATCH(dropout_kernel<float>)(arguments);
//
// This file includes CONVAI_FAST_KERNEL for each of them, hence no #pragma once, after the vectors
// that kernels are made of. They see
//   CONVAI_FAST_ISA     the namespace: portable, avx2, avx512 or avx512_bf16
//   CONVAI_FAST_WIDTH   floats in a vector
//   CONVAI_FAST_BF16    1 for the last of them alone, which multiplies bfloat16 and int8
//   CONVAI_FAST_TARGET  the attribute that lets a function use the instructions
//   CONVAI_FAST_INLINE  the same for a function that is inlined, as all are that pass vectors, and
//                       CONVAI_FAST_INLINE_LAMBDA for such a lambda
//
// Were there a file for each with compiler flags of its own, functions of the standard library
// would be compiled with these too, and the linker might keep for everyone what only AVX-512 can
// run. Here whatever bears no mark is compiled once, for all. A template over the width without
// marks does not serve: GCC takes comparisons of wide vectors apart before it inlines them.
#include "simd/half.h"
#include "simd/isa.h"
#include "simd/packed.h"
#include "simd/philox.h"
#include "simd/vector_types.h"

#if CONVAI_FAST_X86
#include <immintrin.h>
#endif

#define CONVAI_FAST_INLINE CONVAI_FAST_TARGET __attribute__((always_inline)) inline
#define CONVAI_FAST_INLINE_LAMBDA CONVAI_FAST_TARGET __attribute__((always_inline))

#define CONVAI_FAST_BF16 0

#define CONVAI_FAST_ISA portable
#define CONVAI_FAST_WIDTH 4
#define CONVAI_FAST_TARGET
#include "simd/vector.h"
#include CONVAI_FAST_KERNEL
#undef CONVAI_FAST_ISA
#undef CONVAI_FAST_WIDTH
#undef CONVAI_FAST_TARGET

#if CONVAI_FAST_X86
#define CONVAI_FAST_ISA avx2
#define CONVAI_FAST_WIDTH 8
#define CONVAI_FAST_TARGET __attribute__((target("avx2,fma,f16c,bmi,popcnt")))
#include "simd/vector.h"
#include CONVAI_FAST_KERNEL
#undef CONVAI_FAST_ISA
#undef CONVAI_FAST_WIDTH
#undef CONVAI_FAST_TARGET

#define CONVAI_FAST_ISA avx512
#define CONVAI_FAST_WIDTH 16
#define CONVAI_FAST_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi,popcnt")))
#include "simd/vector.h"
#include CONVAI_FAST_KERNEL
#undef CONVAI_FAST_ISA
#undef CONVAI_FAST_WIDTH
#undef CONVAI_FAST_TARGET

#undef CONVAI_FAST_BF16
#define CONVAI_FAST_BF16 1
#define CONVAI_FAST_ISA avx512_bf16
#define CONVAI_FAST_WIDTH 16
#define CONVAI_FAST_TARGET                                                        \
  __attribute__((                                                                 \
      target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,fma,f16c," \
             "bmi,popcnt")))
#include "simd/vector.h"
#include CONVAI_FAST_KERNEL
#undef CONVAI_FAST_ISA
#undef CONVAI_FAST_WIDTH
#undef CONVAI_FAST_TARGET

#define CONVAI_FAST_DISPATCH(...)                                           \
  (simd::current_isa() == simd::Isa::kAvx512Bf16 ? avx512_bf16::__VA_ARGS__ \
   : simd::current_isa() == simd::Isa::kAvx512   ? avx512::__VA_ARGS__      \
   : simd::current_isa() == simd::Isa::kAvx2     ? avx2::__VA_ARGS__        \
                                                 : portable::__VA_ARGS__)
#else
#define CONVAI_FAST_DISPATCH(...) (portable::__VA_ARGS__)
#endif

#undef CONVAI_FAST_BF16
#undef CONVAI_FAST_KERNEL
