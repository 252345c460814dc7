// Where each part of a candidate's sequence goes. CPU and CUDA share this walk, so that the layout
// is written down once:
//
//   [bos] persona...  [speaker] history[0] ...  [speaker] history[-1]  [speaker1] reply [eos]
//
// In the padded layout a row is one such sequence. In the shared-prefix layout all that stands
// before [speaker1] comes once, followed by that last part of every candidate, and the examples of
// a batch follow one another without padding.
#pragma once

#include <cstdint>

#include "simd/host_device.h"

namespace convai_fast::collate {

constexpr int64_t kIgnoredLabel = -100;

struct SpecialIds {
  int64_t bos, eos, speaker1, speaker2, pad;
};

// One row of the plan, in the order of PLAN_COLUMNS in convai_fast/ops/collate.py.
struct PlanRow {
  int64_t persona_first, persona_count, persona_rotation, persona_kept;
  int64_t history_first, history_count, history_skip;
  int64_t candidate_first, candidate_count;
};
constexpr int64_t kPlanColumns = sizeof(PlanRow) / sizeof(int64_t);

template <typename Token>
struct Input {
  const Token* tokens;               // [num_tokens]
  const int64_t* utterance_offsets;  // [num_utterances + 1]
  int64_t num_tokens, num_utterances;
  const int32_t* persona_ids;
  const int32_t* history_ids;
  const int32_t* candidate_ids;
  const PlanRow* plan;  // [batch]
  int64_t num_candidates;
  int64_t seq_len;         // of a row of the padded output
  const int64_t* offsets;  // [batch + 1], where each example begins in the shared output
  int64_t max_length;      // of one candidate's sequence; a longer reply is cut
  SpecialIds special;
};

struct PaddedOutput {
  int64_t* input_ids;       // [batch, num_candidates, seq_len]
  int64_t* token_type_ids;  // [batch, num_candidates, seq_len]
  int64_t* labels;          // [batch, num_candidates, seq_len]
  int64_t* mc_token_ids;    // [batch, num_candidates]
};

struct SharedOutput {
  int64_t* input_ids;  // [num_tokens], and so are the next four
  int64_t* token_type_ids;
  int64_t* position_ids;
  int64_t* branch_ids;
  int64_t* labels;
  int64_t* mc_token_ids;  // [batch, num_candidates]
};

// A candidate's reply, cut to the room there is. A reply that was cut does not end there: <eos>
// still follows it, for the multiple-choice head to read, but has no label.
template <typename Token>
struct Reply {
  const Token* tokens;
  int64_t length, num_labels;
};

template <typename Token>
CONVAI_FAST_HOST_DEVICE inline Reply<Token> reply_of(const Input<Token>& in, int32_t candidate,
                                                     int64_t room) {
  const int64_t begin = in.utterance_offsets[candidate];
  const int64_t length = in.utterance_offsets[candidate + 1] - begin;
  const bool is_cut = length > room;
  return {in.tokens + begin, is_cut ? room : length, is_cut ? room : length + 1};
}

// Whether the row leaves out no more of its first turn than there is. Of the plan's columns this is
// the one that only the store's arrays can tell, wherever they lie.
template <typename Token>
CONVAI_FAST_HOST_DEVICE inline bool skips_within_a_turn(const Input<Token>& in,
                                                        const PlanRow& row) {
  if (row.history_skip == 0) return true;
  const int64_t turn = in.history_ids[row.history_first];
  return row.history_skip <= in.utterance_offsets[turn + 1] - in.utterance_offsets[turn];
}

// Calls write_token(position, token, segment) and write_utterance(position, source, length,
// segment) for each part of the row's persona and history. Returns the length of the prefix.
// Nothing is written at or beyond `limit`, so that a return value above it is safe to report.
template <typename Token, typename WriteToken, typename WriteUtterance>
CONVAI_FAST_HOST_DEVICE inline int64_t walk_prefix(const Input<Token>& in, const PlanRow& row,
                                                   int64_t limit, WriteToken&& write_token,
                                                   WriteUtterance&& write_utterance) {
  int64_t position = 0;
  const auto add_token = [&](int64_t token, int64_t segment) {
    if (position < limit) write_token(position, token, segment);
    ++position;
  };
  const auto add_utterance = [&](int64_t utterance, int64_t segment, int64_t skip) {
    const int64_t begin = in.utterance_offsets[utterance] + skip;
    const int64_t length = in.utterance_offsets[utterance + 1] - begin;
    if (position + length <= limit) {
      write_utterance(position, in.tokens + begin, length, segment);
    }
    position += length;
  };

  add_token(in.special.bos, in.special.speaker1);
  for (int64_t i = 0; i < row.persona_kept; ++i) {
    // A rotation by 1 reads [a, b, c] as [c, a, b].
    int64_t source = i - row.persona_rotation;
    if (source < 0) source += row.persona_count;
    add_utterance(in.persona_ids[row.persona_first + source], in.special.speaker1, 0);
  }
  for (int64_t i = 0; i < row.history_count; ++i) {
    const bool partner = (row.history_count - i) % 2 == 1;
    const int64_t speaker = partner ? in.special.speaker2 : in.special.speaker1;
    add_token(speaker, speaker);
    add_utterance(in.history_ids[row.history_first + i], speaker, i == 0 ? row.history_skip : 0);
  }
  return position;
}

}  // namespace convai_fast::collate
