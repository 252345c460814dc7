// The loops over a row of logits or of weights that `sample` is made of.
//
// sample_kernel.h includes this file once for each instruction set, hence no #pragma once, with
//   CONVAI_FAST_ISA     the namespace, `portable`, `avx2` or `avx512`
//   CONVAI_FAST_TARGET  the attribute that lets a function use those instructions
//   CONVAI_FAST_WIDTH   floats in a vector
// GCC lowers vectors before it inlines, so a template shared by all of them would not do.
//
// Sums run over fixed chunks, whatever the thread or the batch, so that a row always gives the same
// bits. Arrays of weights are padded with zeros to whole blocks.

namespace convai_fast {
namespace CONVAI_FAST_ISA {

constexpr int kWidth = CONVAI_FAST_WIDTH;
typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));

#define CONVAI_FAST_INLINE CONVAI_FAST_TARGET __attribute__((always_inline)) inline

CONVAI_FAST_INLINE Floats load(const float* source) {
  Floats v;
  __builtin_memcpy(&v, source, sizeof(v));
  return v;
}

CONVAI_FAST_INLINE void store(float* target, Floats v) { __builtin_memcpy(target, &v, sizeof(v)); }

CONVAI_FAST_INLINE Floats splat(float value) { return value - Floats{}; }

// v where the mask is set, else 0.
CONVAI_FAST_INLINE Floats where(Ints mask, Floats v) { return (Floats)(mask & (Ints)v); }

CONVAI_FAST_INLINE double sum(Floats v) {
  double total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
}

// The block that begins at `source`, in `buffer` and filled up with -inf if it is not whole.
CONVAI_FAST_INLINE const float* whole_block(const float* source, int64_t remaining, float* buffer) {
  if (remaining >= kBlock) return source;
  std::fill_n(buffer, kBlock, -std::numeric_limits<float>::infinity());
  std::copy_n(source, remaining, buffer);
  return buffer;
}

// The largest of each block. Returns the largest of all, or NaN if there is one.
CONVAI_FAST_TARGET inline float block_maxima(const float* logits, int64_t size, float* maxima) {
  float buffer[kBlock];
  Ints nan = {};
  float row_largest = -std::numeric_limits<float>::infinity();
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const float* block = whole_block(logits + begin, size - begin, buffer);
    Floats largest = load(block);
    nan |= largest != largest;
    for (int i = kWidth; i < kBlock; i += kWidth) {
      const Floats v = load(block + i);
      nan |= v != v;
      largest = largest > v ? largest : v;
    }
    float m = largest[0];
    for (int i = 1; i < kWidth; ++i) m = m > largest[i] ? m : largest[i];
    maxima[begin / kBlock] = m;
    row_largest = row_largest > m ? row_largest : m;
  }
  int32_t any = 0;
  for (int i = 0; i < kWidth; ++i) any |= nan[i];
  return any ? std::numeric_limits<float>::quiet_NaN() : row_largest;
}

// weights = exp((logits - largest) / temperature), to 2 units in the last place, which are added
// up. Exactly 1 for the largest, and exactly 0 below 2^-126.
//
// With t = (logit - largest) / (temperature log(2)), its nearest integer n and r = t - n, a weight
// is 2^n times a polynomial in r. t is never rounded as a whole: where there is a fused
// multiply-add, a factor in two parts gives r as precisely as a division would, which takes longer.
CONVAI_FAST_TARGET inline double exponentials(const float* logits, int64_t size, float largest,
                                              float temperature, float* weights) {
  const double factor = std::clamp(1.4426950408889634 / temperature, 1e-36, 1e36);
  const float high = static_cast<float>(factor), low = static_cast<float>(factor - high);
  const float least = static_cast<float>(-127 / factor);
  // Adding it leaves n, plus a float's exponent bias, in the lowest bits.
  constexpr float kRound = 0x1.8p23f + 127;
  constexpr int kUnroll = 2, kStep = kUnroll * kWidth;  // hides the latency of the polynomial
  float buffer[kBlock];
  double total = 0;
  for (int64_t chunk = 0; chunk < size; chunk += kChunk) {
    Floats sums[kUnroll] = {};
    const int64_t end = std::min(size, chunk + kChunk);
    for (int64_t begin = chunk; begin < end; begin += kBlock) {
      const float* block = whole_block(logits + begin, size - begin, buffer);
      for (int i = 0; i < kBlock; i += kStep) {
        Floats d[kUnroll], shifted[kUnroll], n[kUnroll], r[kUnroll], e[kUnroll];
#define CONVAI_FAST_EACH for (int j = 0; j < kUnroll; ++j)
        CONVAI_FAST_EACH d[j] = load(block + i + j * kWidth) - largest;
        CONVAI_FAST_EACH d[j] = d[j] > least ? d[j] : splat(least);
        CONVAI_FAST_EACH shifted[j] = d[j] * high + kRound;
        CONVAI_FAST_EACH n[j] = shifted[j] - kRound;
        CONVAI_FAST_EACH r[j] = d[j] * high - n[j];
        CONVAI_FAST_EACH r[j] = d[j] * low + r[j];
        CONVAI_FAST_EACH e[j] = r[j] * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
        CONVAI_FAST_EACH e[j] = e[j] * r[j] + 0x1.c6b752p-5f;
        CONVAI_FAST_EACH e[j] = e[j] * r[j] + 0x1.ebf9bcp-3f;
        CONVAI_FAST_EACH e[j] = e[j] * r[j] + 0x1.62e42ap-1f;
        CONVAI_FAST_EACH e[j] = e[j] * r[j] + 1.0f;
        CONVAI_FAST_EACH e[j] *= (Floats)((Ints)shifted[j] << 23);  // 2^n, or 0 for n = -127
        CONVAI_FAST_EACH sums[j] += e[j];
        CONVAI_FAST_EACH store(weights + begin + i + j * kWidth, e[j]);
#undef CONVAI_FAST_EACH
      }
    }
    for (const Floats& s : sums) total += sum(s);
  }
  return total;
}

// The mass of the weights that reach `threshold`, chunk by chunk.
CONVAI_FAST_TARGET inline void chunk_masses(const float* weights, int64_t size, float threshold,
                                            double* masses) {
  constexpr int kSums = kBlock / kWidth < 4 ? kBlock / kWidth : 4;
  for (int64_t chunk = 0; chunk < size; chunk += kChunk) {
    Floats sums[kSums] = {};
    const int64_t end = std::min(size, chunk + kChunk);
    for (int64_t begin = chunk; begin < end; begin += kBlock) {
      for (int i = 0; i < kBlock; i += kWidth) {
        const Floats e = load(weights + begin + i);
        sums[i / kWidth % kSums] += where(e >= threshold, e);
      }
    }
    double mass = 0;
    for (const Floats& s : sums) mass += sum(s);
    masses[chunk / kChunk] = mass;
  }
}

// The mass of the weights that reach each of the pivots.
CONVAI_FAST_TARGET inline void pivot_masses(const float* weights, int64_t size, const float* pivots,
                                            double* masses) {
  std::fill_n(masses, kPivots, 0.0);
  for (int64_t chunk = 0; chunk < size; chunk += kChunk) {
    Floats sums[kPivots] = {};
    const int64_t end = std::min(size, chunk + kChunk);
    for (int64_t i = chunk; i < end; i += kWidth) {
      const Floats e = load(weights + i);
      for (int j = 0; j < kPivots; ++j) sums[j] += where(e >= pivots[j], e);
    }
    for (int j = 0; j < kPivots; ++j) masses[j] += sum(sums[j]);
  }
}

// Appends the lanes of `values` and `indices` that the mask sets to a list of `count`, and returns
// its new length. Writes up to a whole vector beyond it.
CONVAI_FAST_INLINE int64_t append(Ints mask, Floats values, Ints indices, float* listed_values,
                                  int32_t* listed_indices, int64_t count) {
#if CONVAI_FAST_WIDTH == 16
  const __mmask16 lanes = _mm512_movepi32_mask((__m512i)mask);
  _mm512_storeu_ps(listed_values + count, _mm512_maskz_compress_ps(lanes, (__m512)values));
  _mm512_storeu_si512(listed_indices + count, _mm512_maskz_compress_epi32(lanes, (__m512i)indices));
  return count + __builtin_popcount(lanes);
#elif CONVAI_FAST_WIDTH == 8
  const int lanes = _mm256_movemask_ps((__m256)mask);
  int64_t packed;  // for each place, the lane that moves there
  __builtin_memcpy(&packed, kCompaction.lanes[lanes], sizeof(packed));
  const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(packed));
  _mm256_storeu_ps(listed_values + count, _mm256_permutevar8x32_ps((__m256)values, order));
  _mm256_storeu_si256((__m256i*)(listed_indices + count),
                      _mm256_permutevar8x32_epi32((__m256i)indices, order));
  return count + __builtin_popcount(lanes);
#else
  for (int i = 0; i < kWidth; ++i) {
    listed_values[count] = values[i];
    listed_indices[count] = indices[i];
    count -= mask[i];  // -1 where it is set
  }
  return count;
#endif
}

CONVAI_FAST_INLINE Ints load_indices(const int32_t* source) {
  Ints v;
  __builtin_memcpy(&v, source, sizeof(v));
  return v;
}

CONVAI_FAST_INLINE Ints count_up() {
  Ints v = {};
  for (int i = 0; i < kWidth; ++i) v[i] = i;
  return v;
}

// Lists the weights in [low, high), in order, with their `indices`, or with their places if that is
// null. May be done in place.
CONVAI_FAST_TARGET inline Selection select(const float* weights, const int32_t* indices,
                                           int64_t size, float low, float high,
                                           float* listed_weights, int32_t* listed_indices) {
  Selection s;
  for (int64_t chunk = 0; chunk < size; chunk += kChunk) {
    Floats above = {};
    const int64_t end = std::min(size, chunk + kChunk);
    for (int64_t i = chunk; i < end; i += kWidth) {
      const Floats e = load(weights + i);
      const Ints is_above = e >= high, is_inside = (e >= low) & ~is_above;
      above += where(is_above, e);
      const Ints at = indices ? load_indices(indices + i) : count_up() + static_cast<int32_t>(i);
      s.count = append(is_inside, e, at, listed_weights, listed_indices, s.count);
    }
    s.mass_above += sum(above);
  }
  return s;
}

// Lists the tempered logits, (logit - largest) / temperature, that reach `bound`, in order. Blocks
// whose maximum falls short of `logit_bound` are known to hold none.
CONVAI_FAST_TARGET inline int64_t collect(const float* logits, int64_t size, const float* maxima,
                                          float logit_bound, float largest, float temperature,
                                          float bound, float* listed, int32_t* tokens) {
  float buffer[kBlock];
  int64_t count = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    if (maxima[begin / kBlock] < logit_bound) continue;
    const float* block = whole_block(logits + begin, size - begin, buffer);
    for (int i = 0; i < kBlock; i += kWidth) {
      const Floats z = (load(block + i) - largest) / temperature;
      const Ints at = count_up() + static_cast<int32_t>(begin + i);
      count = append(z >= bound, z, at, listed, tokens, count);
    }
  }
  return count;
}

inline constexpr RowPasses kPasses{block_maxima, exponentials, chunk_masses,
                                   pivot_masses, select,       collect};

#undef CONVAI_FAST_INLINE

}  // namespace CONVAI_FAST_ISA
}  // namespace convai_fast
