// `collate` for one example on the CPU: no torch, raw pointers.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <utility>

#include "ops/collate/layout.h"

#define CONVAI_FAST_KERNEL "ops/collate/widen.h"
#include "simd/each_isa.h"

namespace convai_fast::collate {

template <typename Token>
void widen(const Token* source, int64_t* target, int64_t length) {
  CONVAI_FAST_DISPATCH(widen<Token>)(source, target, length);
}

template <typename Token>
bool is_utterance(const Input<Token>& in, int64_t id) {
  if (id < 0 || id >= in.num_utterances) return false;
  const int64_t begin = in.utterance_offsets[id], end = in.utterance_offsets[id + 1];
  return 0 <= begin && begin <= end && end <= in.num_tokens;
}

// Whether all that the row names lies in the store, and the row leaves out no more of its first
// turn than there is.
template <typename Token>
bool is_within_store(const Input<Token>& in, const PlanRow& row) {
  const Layout& layout = in.layout;
  const auto are_texts = [&](const int32_t* ids, int64_t count,
                             std::initializer_list<int64_t> places) {
    int64_t checked = -1;  // most places are alike
    return std::all_of(places.begin(), places.end(), [&](int64_t place) {
      if (place == std::exchange(checked, place)) return true;
      return std::all_of(ids, ids + count,
                         [&](int64_t id) { return id >= 0 && is_utterance(in, id + place); });
    });
  };
  return are_texts(in.persona_ids + row.persona_first, row.persona_count,
                   {layout.only_sentence, layout.last_sentence, layout.first_sentence,
                    layout.middle_sentence}) &&
         are_texts(in.history_ids + row.history_first, row.history_count,
                   {layout.speaker1_turn, layout.speaker2_turn, layout.turn_with_persona}) &&
         are_texts(in.candidate_ids + row.candidate_first, row.candidate_count, {layout.reply}) &&
         skips_within_a_turn(in, row);
}

// Writes what all candidates share at `ids` and `segments`, which hold `limit` tokens, and returns
// their length.
template <typename Token>
int64_t write_prefix(const Input<Token>& in, const PlanRow& row, int64_t limit, int64_t* ids,
                     int64_t* segments) {
  return walk_prefix(in, row, limit,
                     [&](int64_t position, const Token* source, int64_t length, int64_t segment) {
                       if (length == 1) {  // as most of what stands around texts
                         ids[position] = *source;
                         segments[position] = segment;
                         return;
                       }
                       widen(source, ids + position, length);
                       std::fill_n(segments + position, length, segment);
                     });
}

// Writes the token that begins a reply, the reply and eos at `ids` and `segments`, and returns the
// length of the three.
template <typename Token>
int64_t write_reply(const Layout& layout, const Reply<Token>& reply, int64_t* ids,
                    int64_t* segments) {
  ids[0] = layout.reply_begin;
  widen(reply.tokens, ids + 1, reply.length);
  ids[reply.length + 1] = layout.eos;
  std::fill_n(segments, reply.length + 2, layout.speaker1);
  return reply.length + 2;
}

// Fills all candidates of example `i`. The prefix is written for the first candidate and copied to
// the others. Returns false, with nothing usable written, when the prefix leaves no room for the
// tokens around a reply.
template <typename Token>
bool collate_example(const Input<Token>& in, const PaddedOutput& out, int64_t i) {
  const int64_t first_row = i * in.num_candidates;
  const int64_t num_present = in.plan[i].candidate_count;
  const int32_t* candidates = in.candidate_ids + in.plan[i].candidate_first;

  const int64_t* first_ids = out.input_ids + first_row * in.seq_len;
  const int64_t* first_segments = out.token_type_ids + first_row * in.seq_len;
  int64_t prefix = 0;
  for (int64_t j = 0; j < in.num_candidates; ++j) {
    const int64_t row = first_row + j;
    int64_t* ids = out.input_ids + row * in.seq_len;
    int64_t* segments = out.token_type_ids + row * in.seq_len;
    int64_t* labels = out.labels + row * in.seq_len;
    int64_t end = 0;
    std::fill_n(labels, in.seq_len, kIgnoredLabel);
    if (j < num_present) {
      if (j == 0) {
        prefix = write_prefix(in, in.plan[i], in.seq_len, ids, segments);
        if (prefix + 2 > in.seq_len) return false;
      } else {
        std::memcpy(ids, first_ids, prefix * sizeof(int64_t));
        std::memcpy(segments, first_segments, prefix * sizeof(int64_t));
      }
      const auto reply = reply_of(in, candidates[j], in.max_length - prefix - 2);
      end = prefix + write_reply(in.layout, reply, ids + prefix, segments + prefix);
      if (j == num_present - 1) {  // the true reply is the last one
        std::copy_n(ids + prefix + 1, reply.num_labels, labels + prefix + 1);
      }
    }
    std::fill(ids + end, ids + in.seq_len, in.layout.pad);
    std::fill(segments + end, segments + in.seq_len, in.layout.pad);
    out.mc_token_ids[row] = end - 1;
  }
  return true;
}

// Fills what lies between the offsets of example `i`: its prefix once, and every candidate's own
// part. Returns false, with nothing usable written, when that is not its length, or when the prefix
// does not fit `max_length`.
template <typename Token>
bool collate_example(const Input<Token>& in, const SharedOutput& out, int64_t i) {
  const int64_t begin = in.offsets[i], length = in.offsets[i + 1] - begin;
  int64_t* ids = out.input_ids + begin;
  int64_t* segments = out.token_type_ids + begin;
  int64_t* positions = out.position_ids + begin;
  int64_t* branches = out.branch_ids + begin;
  int64_t* labels = out.labels + begin;
  int64_t* mc_token_ids = out.mc_token_ids + i * in.num_candidates;
  const int64_t num_present = in.plan[i].candidate_count;
  const int32_t* candidates = in.candidate_ids + in.plan[i].candidate_first;

  const int64_t prefix = write_prefix(in, in.plan[i], length, ids, segments);
  const int64_t room = in.max_length - prefix - 2;
  if ((num_present > 0 && room < 0) || prefix > length) return false;
  std::iota(positions, positions + prefix, 0);
  std::fill_n(branches, prefix, 0);
  std::fill_n(labels, length, kIgnoredLabel);
  int64_t end = prefix;
  for (int64_t j = 0; j < num_present; ++j) {
    const auto reply = reply_of(in, candidates[j], room);
    if (end + reply.length + 2 > length) return false;
    const int64_t part = write_reply(in.layout, reply, ids + end, segments + end);
    std::iota(positions + end, positions + end + part, prefix);
    std::fill_n(branches + end, part, j + 1);
    if (j == num_present - 1) {  // the true reply is the last one
      std::copy_n(ids + end + 1, reply.num_labels, labels + end + 1);
    }
    end += part;
    mc_token_ids[j] = begin + end - 1;
  }
  std::fill(mc_token_ids + num_present, mc_token_ids + in.num_candidates, -1);
  return end == length;
}

}  // namespace convai_fast::collate
