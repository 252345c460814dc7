// Where each part of a candidate's sequence goes. CPU and CUDA share this walk, the twin of
// build_sequence in convai_fast/dialogue/layout.py:
//
//   begin  persona  turn ... turn  reply_open reply eos
//
// In the padded layout a row is one such sequence. In the shared-prefix layout all that stands
// before the last token of reply_open comes once, followed by that token, reply and eos of every
// candidate, and the examples of a batch follow one another without padding.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd/host_device.h"

namespace convai_fast::collate {

constexpr int64_t kIgnoredLabel = -100;

// What stands around texts, in the order of LAYOUT_NUMBERS in convai_fast/ops/plan.py.
struct Layout {
  int64_t eos, reply_begin, pad;
  int64_t speaker1, speaker2;
  int64_t persona_turn, partner_begins;
  int64_t begin, persona_open, persona_close, no_persona;
  int64_t speaker1_open, speaker1_close, speaker2_open, speaker2_close, reply_open;
  int64_t only_sentence, first_sentence, last_sentence, middle_sentence;
  int64_t speaker1_turn, speaker2_turn, turn_with_persona, reply;
};
constexpr int64_t kLayoutNumbers = sizeof(Layout) / sizeof(int64_t);
constexpr int64_t kFirstPiece = offsetof(Layout, begin) / sizeof(int64_t);
constexpr int64_t kFirstPlace = offsetof(Layout, only_sentence) / sizeof(int64_t);
enum PersonaTurn : int64_t { kNoTurn, kFirstTurn, kLastTurn };

// One row of the plan, in the order of PLAN_COLUMNS in convai_fast/ops/plan.py.
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
  Layout layout;
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

// A candidate's reply, cut to the room there is. A reply that was cut does not end there: eos
// still follows it, for the multiple-choice head to read, but has no label.
template <typename Token>
struct Reply {
  const Token* tokens;
  int64_t length, num_labels;
};

template <typename Token>
CONVAI_FAST_HOST_DEVICE inline Reply<Token> reply_of(const Input<Token>& in, int32_t candidate,
                                                     int64_t room) {
  const int64_t* bounds = in.utterance_offsets + in.layout.reply + candidate;
  const int64_t begin = bounds[0], length = bounds[1] - begin;
  const bool is_cut = length > room;
  return {in.tokens + begin, is_cut ? room : length, is_cut ? room : length + 1};
}

// The place of sentence `i` of `count`.
CONVAI_FAST_HOST_DEVICE inline int64_t place_of_sentence(const Layout& layout, int64_t i,
                                                         int64_t count) {
  if (i == 0) return count == 1 ? layout.only_sentence : layout.first_sentence;
  return i + 1 == count ? layout.last_sentence : layout.middle_sentence;
}

// The first of `count` turns: 0, or -1 for an empty one of the partner's before them.
CONVAI_FAST_HOST_DEVICE inline int64_t first_turn(const Layout& layout, int64_t count) {
  return layout.partner_begins && count % 2 == 0 ? -1 : 0;
}

constexpr int64_t kStandsAlone = -2;

// Which of `count` turns a persona is a part of.
CONVAI_FAST_HOST_DEVICE inline int64_t turn_of_persona(const Layout& layout, int64_t count) {
  if (layout.persona_turn == kNoTurn) return kStandsAlone;
  return layout.persona_turn == kFirstTurn ? first_turn(layout, count) : count - 1;
}

// Whether turn `i` of `count` is the partner's, who speaks last.
CONVAI_FAST_HOST_DEVICE inline bool is_partners(int64_t i, int64_t count) {
  return (count - i) % 2 == 1;
}

// The place of turn `i` of `count`.
CONVAI_FAST_HOST_DEVICE inline int64_t place_of_turn(const Layout& layout, int64_t i, int64_t count,
                                                     bool has_persona) {
  if (has_persona && i == turn_of_persona(layout, count)) return layout.turn_with_persona;
  return is_partners(i, count) ? layout.speaker2_turn : layout.speaker1_turn;
}

// Whether the row leaves out no more of its first turn than there is. Of the plan's columns this is
// the one that only the store's arrays can tell, wherever they lie.
template <typename Token>
CONVAI_FAST_HOST_DEVICE inline bool skips_within_a_turn(const Input<Token>& in,
                                                        const PlanRow& row) {
  if (row.history_skip == 0) return true;
  const int64_t turn = in.history_ids[row.history_first] +
                       place_of_turn(in.layout, 0, row.history_count, row.persona_kept > 0);
  return row.history_skip <= in.utterance_offsets[turn + 1] - in.utterance_offsets[turn];
}

// Calls write(position, source, length, segment) for each part of what precedes the last token of
// reply_open. Returns its length. Nothing is written at or beyond `limit`, so that a return value
// above it is safe to report.
template <typename Token, typename Write>
CONVAI_FAST_HOST_DEVICE inline int64_t walk_prefix(const Input<Token>& in, const PlanRow& row,
                                                   int64_t limit, Write&& write) {
  const Layout& layout = in.layout;
  int64_t position = 0;
  const auto add = [&](int64_t utterance, int64_t segment, int64_t skip = 0) {
    const int64_t begin = in.utterance_offsets[utterance] + skip;
    const int64_t length = in.utterance_offsets[utterance + 1] - begin;
    if (length > 0 && position + length <= limit) {
      write(position, in.tokens + begin, length, segment);
    }
    position += length;
  };
  const auto add_persona = [&] {
    add(layout.persona_open, layout.speaker1);
    for (int64_t i = 0; i < row.persona_kept; ++i) {
      // A rotation by 1 reads [a, b, c] as [c, a, b].
      int64_t source = i - row.persona_rotation;
      if (source < 0) source += row.persona_count;
      add(in.persona_ids[row.persona_first + source] +
              place_of_sentence(layout, i, row.persona_kept),
          layout.speaker1);
    }
    add(layout.persona_close, layout.speaker1);
  };

  add(layout.begin, layout.speaker1);
  const bool has_persona = row.persona_kept > 0;
  if (layout.persona_turn == kNoTurn) {
    if (has_persona) {
      add_persona();
    } else {
      add(layout.no_persona, layout.speaker1);
    }
  }
  const int64_t count = row.history_count;
  const int64_t persona_turn = has_persona ? turn_of_persona(layout, count) : kStandsAlone;
  for (int64_t i = first_turn(layout, count); i < count; ++i) {
    const bool partners = is_partners(i, count);
    const int64_t segment = partners ? layout.speaker2 : layout.speaker1;
    int64_t place = partners ? layout.speaker2_turn : layout.speaker1_turn;
    if (i == persona_turn) {
      add_persona();
      place = layout.turn_with_persona;
    } else {
      add(partners ? layout.speaker2_open : layout.speaker1_open, segment);
    }
    if (i >= 0) {
      const int64_t skip = i == 0 ? row.history_skip : 0;
      add(in.history_ids[row.history_first + i] + place, segment, skip);
    }
    add(partners ? layout.speaker2_close : layout.speaker1_close, segment);
  }
  add(layout.reply_open, layout.speaker1);
  return position;
}

}  // namespace convai_fast::collate
