// The loops over a row of logits or of weights that the CPU's `sample` is made of.
//
// Sums run over fixed chunks, whatever the thread or the batch, so that a row always gives the same
// bits. Arrays of weights are padded with zeros to whole blocks.
#include "ops/sample/row.h"

namespace convai_fast::sample::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;

// A bit for each of a block's values that reaches `bound`.
CONVAI_FAST_INLINE uint64_t reaching(const float* values, float bound) {
  uint64_t set = 0;
  for (int j = 0; j < kBlock; j += kWidth) set |= Simd::lanes(Simd::load(values + j) >= bound) << j;
  return set;
}

// Appends what the bracket holds of a block to a list of `count`. Returns how many the list then
// holds. Writes whole vectors, or eight values, without looking how many there are: a loop whose
// end is not foreseen costs more.
CONVAI_FAST_INLINE int64_t append(const float* values, Bracket b, float* list, int64_t count) {
#if CONVAI_FAST_WIDTH == 16
  const __m512 low = _mm512_set1_ps(b.low), high = _mm512_set1_ps(b.high);
  for (int j = 0; j < kBlock; j += kWidth) {
    const __m512 v = _mm512_loadu_ps(values + j);
    const __mmask16 short_of_high = _mm512_cmp_ps_mask(v, high, _CMP_LT_OQ);
    const __mmask16 inside = _mm512_mask_cmp_ps_mask(short_of_high, v, low, _CMP_GE_OQ);
    _mm512_storeu_ps(list + count, _mm512_maskz_compress_ps(inside, v));
    count += std::popcount(static_cast<uint32_t>(inside));
  }
#else
  uint64_t inside = reaching(values, b.low) & ~reaching(values, b.high);
  while (inside) {
    const int64_t size = count + std::min(std::popcount(inside), 8);
    for (int i = 0; i < 8; ++i, inside &= inside - 1) {
      list[count + i] = values[std::countr_zero(inside)];  // 64 after the last
    }
    count = size;
  }
#endif
  return count;
}

// The block that begins at `source`, in `buffer` and filled up with -inf if it is not whole.
CONVAI_FAST_INLINE const float* whole_block(const float* source, int64_t remaining, float* buffer) {
  if (remaining >= kBlock) return source;
  std::fill_n(buffer, kBlock, -std::numeric_limits<float>::infinity());
  std::copy_n(source, remaining, buffer);
  return buffer;
}

// The largest of each block. Fetches what it will read some pages later, which the processor does
// within a page alone; beyond the row this is the next one. Returns the largest of all, or NaN if
// there is one.
CONVAI_FAST_TARGET inline float block_maxima(const float* logits, int64_t size, float* maxima) {
  float buffer[kBlock];
  Simd::Int nan{};
  float row_largest = -std::numeric_limits<float>::infinity();
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    for (int i = 0; i < kBlock; i += kPerLine) __builtin_prefetch(logits + begin + i + kFetchAhead);
    const float* block = whole_block(logits + begin, size - begin, buffer);
    auto largest = Simd::load(block);
    nan |= largest != largest;
    for (int i = kWidth; i < kBlock; i += kWidth) {
      const auto v = Simd::load(block + i);
      nan |= v != v;
      largest = largest > v ? largest : v;
    }
    const float m = Simd::max(largest);
    maxima[begin / kBlock] = m;
    row_largest = row_largest > m ? row_largest : m;
  }
  int32_t any = 0;
  for (int i = 0; i < kWidth; ++i) any |= nan[i];
  return any ? std::numeric_limits<float>::quiet_NaN() : row_largest;
}

// What gives the weights of a row: see exponentials_of_block.
struct Exponential {
  float largest, factor, least;
};

CONVAI_FAST_INLINE Exponential exponential_of(const Row& row) {
  const double factor = std::clamp(1.4426950408889634 / row.temperature, 1e-36, 1e36);
  return {row.largest, static_cast<float>(factor), static_cast<float>(-127 / factor)};
}

// weights = exp((logits - largest) / temperature), as precisely as the definition's quotient is
// rounded, which are added to the sums. Exactly 1 for the largest, and exactly 0 below 2^-126.
//
// With t = (logit - largest) / (temperature log(2)), its nearest integer n and r = t - n, a weight
// is 2^n times a polynomial in r. A fused multiply-add, where there is one, never rounds t.
constexpr int kUnroll = 2;  // hides the latency of the polynomial
CONVAI_FAST_INLINE void exponentials_of_block(const float* logits, const Exponential& x,
                                              float* weights, Simd::Float* sums) {
  using Float = Simd::Float;
  // Adding it leaves n, plus a float's exponent bias, in the lowest bits.
  constexpr float kRound = 0x1.8p23f + 127;
  for (int i = 0; i < kBlock; i += kUnroll * kWidth) {
    Float d[kUnroll], shifted[kUnroll], n[kUnroll], r[kUnroll], e[kUnroll];
#define CONVAI_FAST_EACH for (int j = 0; j < kUnroll; ++j)
    CONVAI_FAST_EACH d[j] = Simd::load(logits + i + j * kWidth) - x.largest;
    CONVAI_FAST_EACH d[j] = d[j] > x.least ? d[j] : Simd::broadcast(x.least);
    CONVAI_FAST_EACH shifted[j] = d[j] * x.factor + kRound;
    CONVAI_FAST_EACH n[j] = shifted[j] - kRound;
    CONVAI_FAST_EACH r[j] = d[j] * x.factor - n[j];
    CONVAI_FAST_EACH e[j] = r[j] * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
    CONVAI_FAST_EACH e[j] = e[j] * r[j] + 0x1.c6b752p-5f;
    CONVAI_FAST_EACH e[j] = e[j] * r[j] + 0x1.ebf9bcp-3f;
    CONVAI_FAST_EACH e[j] = e[j] * r[j] + 0x1.62e42ap-1f;
    CONVAI_FAST_EACH e[j] = e[j] * r[j] + 1.0f;
    CONVAI_FAST_EACH e[j] *= (Float)((Simd::Int)shifted[j] << 23);  // 2^n, or 0 for n = -127
    CONVAI_FAST_EACH sums[j] += e[j];
    CONVAI_FAST_EACH Simd::store(weights + i + j * kWidth, e[j]);
#undef CONVAI_FAST_EACH
  }
}

// The weights of a row, and their sum, for rows that are short.
CONVAI_FAST_TARGET inline float exponentials(const Row& row, float* weights) {
  const Exponential x = exponential_of(row);
  float buffer[kBlock];
  Simd::Float sums[kUnroll] = {};
  for (int64_t begin = 0; begin < row.size; begin += kBlock) {
    const float* block = whole_block(row.logits + begin, row.size - begin, buffer);
    exponentials_of_block(block, x, weights + begin, sums);
  }
  double total = 0;
  for (const auto& s : sums) total += Simd::sum(s);
  return static_cast<float>(total);
}

// Adds up the weights chunk by chunk, all of them and those that reach b.high, and lists what is in
// the bracket, in order, and how many of each chunk, without keeping the others. Blocks whose
// maximum falls short of `logit_bound` are known to hold none of these.
CONVAI_FAST_TARGET inline int64_t weigh(const Row& row, Bracket b, const float* maxima,
                                        float logit_bound, double* totals, double* above,
                                        float* list, int32_t* listed) {
  const Exponential x = exponential_of(row);
  float buffer[kBlock];
  const bool all_above = b.high <= 0;
  alignas(64) float weights[kBlock + 1] = {};  // and what `append` takes for no value
  int64_t count = 0;
  for (int64_t chunk = 0; chunk < row.size; chunk += kChunk) {
    Simd::Float sums[kUnroll] = {}, sums_above = {};
    const int64_t count_before = count;
    for (int64_t i = chunk; i < std::min(row.size, chunk + kChunk); i += kBlock) {
      const float* block = whole_block(row.logits + i, row.size - i, buffer);
      exponentials_of_block(block, x, weights, sums);
      if (all_above || (maxima && maxima[i / kBlock] < logit_bound)) continue;
      for (int j = 0; j < kBlock; j += kWidth) {
        const auto e = Simd::load(weights + j);
        sums_above += e >= b.high ? e : Simd::Float{};
      }
      if (b.low < b.high) count = append(weights, b, list, count);
    }
    double total = 0;
    for (const auto& s : sums) total += Simd::sum(s);
    totals[chunk / kChunk] = total;
    above[chunk / kChunk] = all_above ? total : Simd::sum(sums_above);
    listed[chunk / kChunk] = static_cast<int32_t>(count - count_before);
  }
  return count;
}

// Where the weights are that equal `weight`, in order. Returns how many they are.
CONVAI_FAST_TARGET inline int64_t places_of(const Row& row, float weight, int32_t* places) {
  const Exponential x = exponential_of(row);
  float buffer[kBlock], weights[kBlock];
  Simd::Float sums[kUnroll] = {};
  int64_t count = 0;
  for (int64_t i = 0; i < row.size; i += kBlock) {
    exponentials_of_block(whole_block(row.logits + i, row.size - i, buffer), x, weights, sums);
    uint64_t equal = reaching(weights, weight) & ~reaching(weights, next_up(weight));
    for (; equal; equal &= equal - 1) {
      places[count++] = static_cast<int32_t>(i + std::countr_zero(equal));
    }
  }
  return count;
}

// Adds to each chunk's mass that of its listed weights which reach `least`.
CONVAI_FAST_TARGET inline void add_listed(const float* list, const int32_t* listed, int64_t chunks,
                                          float least, double* masses) {
  Simd::Int lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  for (int64_t chunk = 0; chunk < chunks; list += listed[chunk++]) {
    Simd::Float sums{};
    for (int32_t i = 0; i < listed[chunk]; i += kWidth) {
      const auto e = Simd::load(list + i);
      sums += Simd::where((e >= least) & (lane < listed[chunk] - i), e);
    }
    masses[chunk] += Simd::sum(sums);
  }
}

// The sum of a list's weights.
CONVAI_FAST_TARGET inline double total_of(const float* weights, int64_t size) {
  double total = 0;
  for (int64_t chunk = 0; chunk < size; chunk += kChunk) {
    Simd::Float sums{};
    const int64_t end = std::min(size, chunk + kChunk);
    for (int64_t i = chunk; i < end; i += kWidth) sums += Simd::load(weights + i);
    total += Simd::sum(sums);
  }
  return total;
}

// The mass of the weights that reach each of the pivots.
CONVAI_FAST_TARGET inline void pivot_masses(const float* weights, int64_t size, const float* pivots,
                                            double* masses) {
  std::fill_n(masses, kPivots, 0.0);
  for (int64_t chunk = 0; chunk < size; chunk += kChunk) {
    Simd::Float sums[kPivots] = {};
    const int64_t end = std::min(size, chunk + kChunk);
    for (int64_t i = chunk; i < end; i += kWidth) {
      const auto e = Simd::load(weights + i);
      for (int j = 0; j < kPivots; ++j) sums[j] += Simd::where(e >= pivots[j], e);
    }
    for (int j = 0; j < kPivots; ++j) masses[j] += Simd::sum(sums[j]);
  }
}

// Lists what the bracket holds of a list, in order. May be done in place.
CONVAI_FAST_TARGET inline int64_t select(const float* from, int64_t size, Bracket b, float* list) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; i += kBlock) count = append(from + i, b, list, count);
  return count;
}

// Lists the tempered logits, (logit - largest) / temperature, that reach `bound`, in order, and
// where they are. Logits that fall short of `logit_bound` are known not to.
CONVAI_FAST_TARGET inline int64_t collect(const Row& row, const float* maxima, float logit_bound,
                                          float bound, List list) {
  float buffer[kBlock];
  int64_t count = 0;
  for (int64_t i = 0; i < row.size; i += kBlock) {
    if (maxima[i / kBlock] < logit_bound) continue;
    const float* block = whole_block(row.logits + i, row.size - i, buffer);
    uint64_t reached = reaching(block, logit_bound);
    for (; reached; reached &= reached - 1) {
      const int j = std::countr_zero(reached);
      const float z = row.tempered(block[j]);
      list.values[count] = z;
      list.places[count] = static_cast<int32_t>(i + j);
      count += z >= bound;
    }
  }
  return count;
}

}  // namespace convai_fast::sample::CONVAI_FAST_ISA
