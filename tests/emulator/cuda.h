// What nvcc knows without an include, as far as our kernels use it. To be included first.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "device.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::emulator::self().index)
#define blockIdx (::emulator::block().index)
#define blockDim (dim3{::emulator::cluster->launch.threads})
#define gridDim (::emulator::cluster->launch.grid)

using std::isfinite;
using std::isinf;
using std::isnan;

// ---- types --------------------------------------------------------------------------------------

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulator {

// In place of c10's, which the launch functions hand to the kernels.
struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  BFloat16(float x) {
    const auto all = std::bit_cast<uint32_t>(x);
    bits = x != x ? 0x7FC0 : (all + 0x7FFF + (all >> 16 & 1)) >> 16;
  }
  operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};

struct Half {
  uint16_t bits;

  Half() = default;
  // Rounded by the addition of a number whose last bit is worth what the result's is.
  Half(float x) {
    const uint16_t sign = std::bit_cast<uint32_t>(x) >> 16 & 0x8000;
    const float size = std::fabs(x);
    if (size != size) {
      bits = 0x7E00;
    } else if (size >= 65520) {
      bits = sign | 0x7C00;
    } else if (size < 0x1p-14f) {  // denormal
      bits = sign | (std::bit_cast<uint32_t>(size + 0.5f) - std::bit_cast<uint32_t>(0.5f));
    } else {
      const auto all = std::bit_cast<uint32_t>(size);
      bits = sign | ((all - (112u << 23) + 0xFFF + (all >> 13 & 1)) >> 13);
    }
  }
  operator float() const {
    const uint32_t magnitude = bits & 0x7FFFu, sign = (bits & 0x8000u) << 16;
    const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
    const uint32_t infinite = magnitude >= 0x7C00u ? 0x7F800000u : 0u;  // or NaN
    return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | infinite | sign);
  }
};

}  // namespace emulator

// ---- numbers ------------------------------------------------------------------------------------

template <typename A, typename B>
auto min(A a, B b) {
  using Common = std::common_type_t<A, B>;
  return Common(b) < Common(a) ? Common(b) : Common(a);
}
template <typename A, typename B>
auto max(A a, B b) {
  using Common = std::common_type_t<A, B>;
  return Common(a) < Common(b) ? Common(b) : Common(a);
}

inline int __clz(uint32_t x) { return std::countl_zero(x); }
inline int __ffs(uint32_t x) { return x != 0 ? std::countr_zero(x) + 1 : 0; }
inline int __popc(uint32_t x) { return std::popcount(x); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline uint64_t __float2ull_rn(float x) { return static_cast<uint64_t>(std::nearbyint(x)); }
inline uint64_t __double2ull_ru(double x) { return static_cast<uint64_t>(std::ceil(x)); }
inline float __double2float_rd(double x) {
  const float nearest = static_cast<float>(x);
  return nearest > x ? std::nextafter(nearest, -INFINITY) : nearest;
}
inline float __fmul_ru(float a, float b) {
  const double exact = static_cast<double>(a) * b;
  const float nearest = static_cast<float>(exact);
  return nearest < exact ? std::nextafter(nearest, INFINITY) : nearest;
}
inline float __fsub_rd(float a, float b) { return __double2float_rd(static_cast<double>(a) - b); }
inline float __fmaf_rz(float a, float b, float c) {
  const double sum = static_cast<double>(a) * b + c;
  const float nearest = static_cast<float>(sum);
  return std::fabs(nearest) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}
inline float __expf(float x) { return std::exp(x); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}

// ---- what threads do together -------------------------------------------------------------------

inline void __syncthreads() { emulator::wait(emulator::block().barrier); }
inline void __syncwarp(uint32_t mask = ~0u) { emulator::exchange(mask, false); }

template <typename T>
T __shfl_sync(uint32_t mask, T x, int lane) {
  return emulator::exchange(mask, x)[lane];
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T x, int bits) {
  return emulator::exchange(mask, x)[emulator::self().lane ^ bits];
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T x, int distance) {
  const int lane = emulator::self().lane, source = lane + distance;
  return emulator::exchange(mask, x)[source < 32 ? source : lane];
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T x, int distance) {
  const int lane = emulator::self().lane, source = lane - distance;
  return emulator::exchange(mask, x)[source >= 0 ? source : lane];
}

namespace emulator {

// The lanes of the group for whose value the predicate holds, a bit each.
template <typename T, typename Predicate>
uint32_t lanes_where(const Given<T>& given, Predicate holds) {
  uint32_t lanes = 0;
  for (uint32_t rest = given.mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (holds(given[lane])) lanes |= uint32_t{1} << lane;
  }
  return lanes;
}

}  // namespace emulator

inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
  return emulator::lanes_where(emulator::exchange(mask, predicate), [](bool x) { return x; });
}
inline bool __any_sync(uint32_t mask, bool predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline bool __all_sync(uint32_t mask, bool predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
template <typename T>
uint32_t __match_any_sync(uint32_t mask, T x) {
  return emulator::lanes_where(emulator::exchange(mask, x), [&](T other) { return other == x; });
}

// No two threads run at the same time.
template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address += value;
  return old;
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  if (old < value) *address = value;
  return old;
}
