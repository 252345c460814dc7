// Vectors in the compiler's own vector extension, and sizes that kernels and operators share.
#pragma once

#include <cstdint>

namespace convai_fast::simd {

// Of `width` floats, or of as many bytes; Halves are half as long, Quarters a quarter. The size of
// a vector type must not depend on a template's parameter.
template <int width>
struct Vectors;

#define CONVAI_FAST_VECTORS(width)                                   \
  template <>                                                        \
  struct Vectors<width> {                                            \
    typedef float Float __attribute__((vector_size(4 * width)));     \
    typedef int32_t Int __attribute__((vector_size(4 * width)));     \
    typedef uint32_t Word __attribute__((vector_size(4 * width)));   \
    typedef uint64_t Wide __attribute__((vector_size(4 * width)));   \
    typedef int16_t Pair __attribute__((vector_size(4 * width)));    \
    typedef uint16_t Halves __attribute__((vector_size(2 * width))); \
    typedef uint8_t Quarters __attribute__((vector_size(width)));    \
  };
CONVAI_FAST_VECTORS(4)
CONVAI_FAST_VECTORS(8)
CONVAI_FAST_VECTORS(16)
#undef CONVAI_FAST_VECTORS

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace convai_fast::simd
