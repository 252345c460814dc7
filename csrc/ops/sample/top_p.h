// Top-p: the threshold is guessed, and narrowed down, without a sort of the row.
//
// One pass over the logits finds the maxima of blocks, a second weighs them: of each chunk it keeps
// the sum of its weights and of those above a bracket in which the threshold is guessed to lie, and
// of all the list of weights inside, as values alone. The list is then cut down to an eighth, again
// and again, until the last weight that is kept stands out. Where others weigh as much and not all
// of them are kept, a third pass finds their places.
//
// Weights 1 .5 .2 | .2 .4 .1, two chunks, top-p 0.85 of 2.4, thus 2.04, and the bracket [.15, .45):
//
//   above the bracket   1.5     | 0        1.5 in all, of which .54 are missing
//   inside              .2      | .2 .4    the list .2 .2 .4, of which 1 and 2 are of each chunk
//   kept of it          .2      | .4       1.5 + .4 < 2.04 <= 1.5 + .4 + .2: .4, and the first .2
//
// Masses of the chunks, 1.7 and .4, tell in which of them a token is drawn, and that one alone is
// weighed again.
#pragma once

#include "ops/sample/weighed_row.h"

namespace convai_fast::sample {

// Were the threshold lower, what is below it would not amount to the tail that is cut off.
inline float lowest(const WeighedRow& row, double tail, float least) {
  const auto bound = static_cast<float>(0.999 * tail / static_cast<double>(row.row().size));
  return std::max({bound, least, std::numeric_limits<float>::denorm_min()});
}

// Where the threshold of top-p is likely to be: what is below it adds up to a share of the mass
// that the maxima of the blocks tell together with one in 32 of the other weights. The bracket
// ends where the estimate is two and a half standard deviations away, counting as seen one more
// weight of the size in question.
inline Bracket guess(const WeighedRow& row, float top_p, float least) {
  constexpr int kShift = 19, kNumBins = 0x40000000 >> kShift;  // 16 bins for each power of two
  constexpr double kScale = kStride / kTaken;
  const Scratch& scratch = row.scratch();
  if (!row.has_all_tokens() || row.row().size < 64 * kStride) {
    return {lowest(row, 1 - top_p, least), kAll};
  }
  float* logits = scratch.narrowed();
  const int64_t size = row.take_sample(logits);
  for (int64_t i = 0; i < size; i += kTaken) {
    const float largest = scratch.maxima()[i / kTaken * (kStride / kBlock)];
    for (int64_t j = i; j < i + kTaken; ++j) logits[j] = logits[j] < largest ? logits[j] : kNever;
  }
  const int64_t num_maxima = num_blocks(row.vocab_size());
  float *weights = scratch.inside(), *largest = scratch.ordered_maxima();
  double total = CONVAI_FAST_DISPATCH(exponentials)(
      {scratch.maxima(), num_maxima, row.largest(), row.row().temperature}, largest);
  const float low = lowest(row, (1 - top_p) * total, least);
  total += kScale * CONVAI_FAST_DISPATCH(exponentials)(
                        {logits, size, row.largest(), row.row().temperature}, weights);

  float exact[kNumBins], sampled[kNumBins];
  // What is too small to matter is spread over the lowest bins, lest each addition wait for the
  // one before.
  const int first = std::max(0, (bits(low) >> kShift) - static_cast<int>(kTaken));
  std::fill(exact + first, exact + kNumBins, 0.0f);
  std::fill(sampled + first, sampled + kNumBins, 0.0f);
  const auto add = [first](const float* values, int64_t count, float* bins) {
    for (int64_t begin = 0; begin < count; begin += kTaken) {
      int bin[kTaken];
      for (int i = 0; i < kTaken; ++i) {
        bin[i] = std::max(first + i, bits(values[begin + i]) >> kShift);
      }
      for (int i = 0; i < kTaken; ++i) bins[bin[i]] += values[begin + i];
    }
  };
  add(largest, padded(num_maxima), exact);
  add(weights, size, sampled);

  const auto edge = [](int bin) { return from_bits((bin + 1) << kShift); };
  // What is below counts for its share top_p of the difference, what is above for the rest.
  const double share_below = top_p * kScale, share_above = (1 - top_p) * kScale;
  double variance = 0;
  for (int bin = first; bin < kNumBins; ++bin) {
    variance += share_above * share_above * sampled[bin] * edge(bin);
  }
  Bracket b{low, kAll};
  double below = 0;
  for (int bin = first; bin < kNumBins; ++bin) {
    below += exact[bin] + kScale * sampled[bin];
    variance += (share_below * share_below - share_above * share_above) * sampled[bin] * edge(bin);
    const double away = below - (1 - top_p) * total;
    const double one_more = kScale * edge(bin);
    if (away * away < 6 * (variance + one_more * one_more)) continue;
    if (away > 0) {
      b.high = std::max(edge(bin), low);
      break;
    }
    b.low = std::max(edge(bin), low);
  }
  return b;
}

// An eighth of the bracket in which the mass of what is kept, `above` and of the list, reaches
// the target. Adds what of the list is above it.
inline Bracket narrow(Bracket b, const float* list, int64_t count, double target, double* above) {
  const int64_t width = bits(b.high) - bits(b.low);
  float edges[kPivots + 2];
  for (int i = 0; i < kPivots + 2; ++i) {
    edges[i] = from_bits(static_cast<int32_t>(bits(b.low) + width * i / (kPivots + 1)));
  }
  double masses[kPivots + 1];  // of what reaches edges[1], edges[2], ...
  CONVAI_FAST_DISPATCH(pivot_masses)(list, padded(count), edges + 1, masses);
  masses[kPivots] = 0;
  int i = 0;
  while (i < kPivots && *above + masses[i] >= target) ++i;
  *above += masses[i];
  return {edges[i], edges[i + 1]};
}

// For top-p: weighs the row, and keeps the largest of its weights whose mass reaches that share of
// all; nothing below `least`.
inline void nucleus(WeighedRow& row, float top_p, float least) {
  constexpr int64_t kSortable = 8;
  row.weigh(guess(row, top_p, least));
  const Scratch& scratch = row.scratch();
  float *inside = scratch.inside(), *list = scratch.narrowed();
  double target, above, mass;
  for (bool again = true;; again = false) {
    pad(inside, row.num_listed());
    const double* masses = scratch.above();
    above = std::accumulate(masses, masses + num_chunks(row.row().size), 0.0);
    mass = CONVAI_FAST_DISPATCH(total_of)(inside, padded(row.num_listed()));
    target = top_p * row.total();
    // Where the guess was wrong, the other side of it is right.
    if (again && above >= target) {
      row.weigh({row.bracket().high, kAll});
    } else if (again && above + mass < target && row.bracket().low > least) {
      row.weigh({lowest(row, row.total() - target, least), row.bracket().low});
    } else {
      break;
    }
  }
  Bracket b = row.bracket();
  if (above >= target) return;  // weighed again, the same mass may be rounded otherwise
  if (above + mass < target) return row.keep_listed(b.low);  // min-p keeps less

  int64_t count = row.num_listed();
  const float* from = inside;
  do {
    b = narrow(b, from, count, target, &above);
    count = CONVAI_FAST_DISPATCH(select)(from, padded(count), b, list);
    pad(list, count);
    from = list;
  } while (count > kSortable && bits(b.high) - bits(b.low) > 1);
  if (count <= kSortable) std::sort(list, list + count, std::greater<>());
  int64_t num_kept = 0;
  while (num_kept < count && above < target) above += list[num_kept++];
  if (num_kept == count) return row.keep_listed(b.low);

  // Others may weigh as much as the last that is kept.
  const float last = list[num_kept - 1];
  if (list[num_kept] < last) return row.keep_listed(last);
  row.keep_listed(next_up(last));
  row.keep_ties(list + num_kept - std::find(list, list + num_kept, last));
}

}  // namespace convai_fast::sample
