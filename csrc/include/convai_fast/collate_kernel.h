// `collate` for one example on the CPU: no torch, raw pointers.
#pragma once

#include <algorithm>
#include <cstring>

#include "convai_fast/collate.h"
#include "convai_fast/cpu_features.h"

namespace convai_fast {

// Token ids are stored in 16 or 32 bits and handed out in 64. The loop is compiled once for each
// instruction set; the compiler turns it into widening vector loads.
template <typename Token>
__attribute__((always_inline)) inline void widen_body(const Token* source, int64_t* target,
                                                      int64_t length) {
  for (int64_t i = 0; i < length; ++i) target[i] = source[i];
}

#if CONVAI_FAST_X86
template <typename Token>
CONVAI_FAST_AVX2 void widen_avx2(const Token* source, int64_t* target, int64_t length) {
  widen_body(source, target, length);
}

template <typename Token>
CONVAI_FAST_AVX512 void widen_avx512(const Token* source, int64_t* target, int64_t length) {
  widen_body(source, target, length);
}
#endif

template <typename Token>
void widen_portable(const Token* source, int64_t* target, int64_t length) {
  widen_body(source, target, length);
}

template <typename Token>
using Widen = void (*)(const Token*, int64_t*, int64_t);

template <typename Token>
Widen<Token> widen_for(Isa isa) {
#if CONVAI_FAST_X86
  if (isa == Isa::kAvx512) return widen_avx512<Token>;
  if (isa == Isa::kAvx2) return widen_avx2<Token>;
#endif
  return widen_portable<Token>;
}

// Fills all candidates of example `i`. The prefix is written for the first candidate and copied to
// the others. Returns false, with nothing usable written, when the prefix leaves no room for
// <speaker1> and <eos>.
template <typename Token>
bool collate_example(const CollateInput<Token>& in, const CollateOutput& out, int64_t i,
                     Widen<Token> widen) {
  const int64_t first_row = i * in.num_candidates;
  const int64_t num_present = in.plan[i].candidate_count;
  const int32_t* candidates = in.candidate_ids + in.plan[i].candidate_first;

  int64_t* first_ids = out.input_ids + first_row * in.seq_len;
  int64_t* first_segments = out.token_type_ids + first_row * in.seq_len;
  int64_t prefix = 0;
  if (num_present > 0) {
    prefix = walk_prefix(
        in, in.plan[i],
        [&](int64_t position, int64_t token, int64_t segment) {
          first_ids[position] = token;
          first_segments[position] = segment;
        },
        [&](int64_t position, const Token* source, int64_t length, int64_t segment) {
          widen(source, first_ids + position, length);
          std::fill_n(first_segments + position, length, segment);
        });
    if (prefix + 2 > in.seq_len) return false;
  }

  for (int64_t j = 0; j < in.num_candidates; ++j) {
    const int64_t row = first_row + j;
    int64_t* ids = out.input_ids + row * in.seq_len;
    int64_t* segments = out.token_type_ids + row * in.seq_len;
    int64_t* labels = out.labels + row * in.seq_len;
    int64_t end = 0;
    if (j < num_present) {
      if (j > 0) {
        std::memcpy(ids, first_ids, prefix * sizeof(int64_t));
        std::memcpy(segments, first_segments, prefix * sizeof(int64_t));
      }
      const int64_t begin = in.utterance_offsets[candidates[j]];
      const int64_t reply =
          std::min(in.utterance_offsets[candidates[j] + 1] - begin, in.seq_len - prefix - 2);
      ids[prefix] = in.special.speaker1;
      widen(in.tokens + begin, ids + prefix + 1, reply);
      end = prefix + 1 + reply + 1;
      ids[end - 1] = in.special.eos;
      std::fill(segments + prefix, segments + end, in.special.speaker1);
    }
    std::fill(ids + end, ids + in.seq_len, in.special.pad);
    std::fill(segments + end, segments + in.seq_len, in.special.pad);
    std::fill_n(labels, in.seq_len, kIgnoredLabel);
    if (j == num_present - 1) {  // the true reply is the last one
      std::copy(ids + prefix + 1, ids + end, labels + prefix + 1);
    }
    out.mc_token_ids[row] = end - 1;
  }
  return true;
}

}  // namespace convai_fast
