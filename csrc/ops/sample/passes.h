// The loops over a row of logits or of weights that the CPU's `sample` is made of.
//
// Sums run over fixed chunks, whatever the thread or the batch, so that a row always gives the same
// bits. Arrays of weights are padded with zeros to whole blocks.
#include "ops/sample/row.h"

namespace convai_fast::sample::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;

CONVAI_FAST_INLINE double sum_in_double(Simd::Float v) {
  double total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
}

// Appends those of a block's values that `set` has a bit for to a list of `count`, with their
// places, or if that is null, counted from `first`. Returns how many the list then holds. Eight at
// a time without looking how many there are: a loop whose end is not foreseen costs more.
CONVAI_FAST_INLINE int64_t append(uint64_t set, const float* values, const int32_t* places,
                                  int64_t first, List list, int64_t count) {
  while (set) {
    const int64_t size = count + std::min(std::popcount(set), 8);
    for (int i = 0; i < 8; ++i, set &= set - 1) {
      const int lane = std::countr_zero(set);  // 64 after the last
      list.values[count + i] = values[lane];
      list.places[count + i] = places ? places[lane] : static_cast<int32_t>(first + lane);
    }
    count = size;
  }
  return count;
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
  Simd::Int nan{};
  float row_largest = -std::numeric_limits<float>::infinity();
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const float* block = whole_block(logits + begin, size - begin, buffer);
    auto largest = Simd::load(block);
    nan |= largest != largest;
    for (int i = kWidth; i < kBlock; i += kWidth) {
      const auto v = Simd::load(block + i);
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

// What gives the weights of a row: see exponentials_of_block.
struct Exponential {
  float largest, high, low, least;
};

CONVAI_FAST_INLINE Exponential exponential_of(const Row& row) {
  const double factor = std::clamp(1.4426950408889634 / row.temperature, 1e-36, 1e36);
  const float high = static_cast<float>(factor);
  return {row.largest, high, static_cast<float>(factor - high), static_cast<float>(-127 / factor)};
}

// weights = exp((logits - largest) / temperature), to 2 units in the last place, which are added
// to the sums. Exactly 1 for the largest, and exactly 0 below 2^-126.
//
// With t = (logit - largest) / (temperature log(2)), its nearest integer n and r = t - n, a weight
// is 2^n times a polynomial in r. t is never rounded as a whole: where there is a fused
// multiply-add, a factor in two parts gives r as precisely as a division would, which takes longer.
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
    CONVAI_FAST_EACH shifted[j] = d[j] * x.high + kRound;
    CONVAI_FAST_EACH n[j] = shifted[j] - kRound;
    CONVAI_FAST_EACH r[j] = d[j] * x.high - n[j];
    CONVAI_FAST_EACH r[j] = d[j] * x.low + r[j];
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
  for (const auto& s : sums) total += sum_in_double(s);
  return static_cast<float>(total);
}

// Adds up the weights of [begin, end), chunk by chunk, all of them and those that reach b.high, and
// lists what is in the bracket, in order, without keeping the others. Blocks whose maximum falls
// short of `logit_bound` are known to hold none of these. Returns how many are listed.
CONVAI_FAST_TARGET inline int64_t weigh(const Row& row, int64_t begin, int64_t end, Bracket b,
                                        const float* maxima, float logit_bound, double* totals,
                                        double* above, List list) {
  const Exponential x = exponential_of(row);
  float buffer[kBlock];
  const bool all_above = b.high <= 0;
  alignas(64) float weights[kBlock + 1] = {};
  int64_t count = 0;
  for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
    Simd::Float sums[kUnroll] = {}, sums_above = {};
    for (int64_t i = chunk; i < std::min(end, chunk + kChunk); i += kBlock) {
      const float* block = whole_block(row.logits + i, row.size - i, buffer);
      exponentials_of_block(block, x, weights, sums);
      if (all_above || (maxima && maxima[i / kBlock] < logit_bound)) continue;
      uint64_t inside = 0;
      for (int j = 0; j < kBlock; j += kWidth) {
        const auto e = Simd::load(weights + j);
        const Simd::Int is_above = e >= b.high;
        sums_above += Simd::where(is_above, e);
        inside |= Simd::lanes((e >= b.low) ^ is_above) << j;
      }
      count = append(inside, weights, nullptr, i, list, count);
    }
    double total = 0;
    for (const auto& s : sums) total += sum_in_double(s);
    totals[chunk / kChunk] = total;
    above[chunk / kChunk] = all_above ? total : sum_in_double(sums_above);
  }
  return count;
}

// The sum of a list's weights.
CONVAI_FAST_TARGET inline double total_of(const float* weights, int64_t size) {
  double total = 0;
  for (int64_t chunk = 0; chunk < size; chunk += kChunk) {
    Simd::Float sums{};
    const int64_t end = std::min(size, chunk + kChunk);
    for (int64_t i = chunk; i < end; i += kWidth) sums += Simd::load(weights + i);
    total += sum_in_double(sums);
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
    for (int j = 0; j < kPivots; ++j) masses[j] += sum_in_double(sums[j]);
  }
}

// Lists what the bracket holds of a list, in order. May be done in place. Without places in `from`,
// an entry's place is where it is.
CONVAI_FAST_TARGET inline int64_t select(List from, int64_t size, Bracket b, List list) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; i += kBlock) {
    uint64_t inside = 0;
    for (int j = 0; j < kBlock; j += kWidth) {
      const auto e = Simd::load(from.values + i + j);
      inside |= (Simd::lanes(e >= b.low) ^ Simd::lanes(e >= b.high)) << j;
    }
    const int32_t* places = from.places ? from.places + i : nullptr;
    count = append(inside, from.values + i, places, i, list, count);
  }
  return count;
}

// Lists the tempered logits of [begin, end), (logit - largest) / temperature, that reach `bound`,
// in order. Logits that fall short of `logit_bound` are known not to.
CONVAI_FAST_TARGET inline int64_t collect(const Row& row, int64_t begin, int64_t end,
                                          const float* maxima, float logit_bound, float bound,
                                          List list) {
  float buffer[kBlock];
  int64_t count = 0;
  for (int64_t i = begin; i < end; i += kBlock) {
    if (maxima[i / kBlock] < logit_bound) continue;
    const float* block = whole_block(row.logits + i, row.size - i, buffer);
    uint64_t reached = 0;
    for (int j = 0; j < kBlock; j += kWidth)
      reached |= Simd::lanes(Simd::load(block + j) >= logit_bound) << j;
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
