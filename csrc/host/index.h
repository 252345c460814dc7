// Cuts every example of a split to what the model can read, and measures it. Torch-free.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops/collate/layout.h"

namespace convai_fast {

using collate::kPlanColumns;
using collate::Layout;
using collate::PlanRow;

// One split of the store; see convai_fast/data/store.py.
struct SplitTables {
  const int64_t* utterance_offsets;
  const int64_t* persona_offsets;
  const int32_t* persona_ids;
  const int32_t* history_ids;
  const int32_t* dialogue;       // [num_examples]
  const int64_t* history_first;  // [num_examples]
  const int32_t* history_count;  // [num_examples]
  const int64_t* candidate_offsets;
  const int32_t* candidate_ids;
};

struct IndexOptions {
  int64_t history_turns;   // keep at most this many turns
  int64_t num_candidates;  // keep the last so many candidates; 0: all
  int64_t max_length;      // positions of the model
};

struct CutCounts {
  int64_t history = 0, persona = 0, reply = 0;
};

// What a row measures, in tokens; the columns of `sizes` in convai_fast/data/index.py.
struct RowSizes {
  int32_t padded;  // the longest candidate's sequence
  int32_t shared;  // the prefix once, and every candidate's own part
  int32_t labels;  // the true reply and, unless it was cut, eos
  int32_t is_cut;  // whether the true reply was
  int32_t prefix;  // what its candidates share
};
constexpr int64_t kSizeColumns = sizeof(RowSizes) / sizeof(int32_t);

// What is kept of a persona and a history: the twin of convai_fast/dialogue/fit.py.
struct Fit {
  int64_t num_sentences, num_turns, num_skipped_tokens, num_tokens;
};

// How many tokens stand around texts.
struct Around {
  const Layout& layout;
  int64_t all, persona, no_persona, speaker1, speaker2;

  template <typename Length>
  Around(const Layout& layout, Length&& length_of)
      : layout(layout),
        all(length_of(layout.begin) + length_of(layout.reply_open)),
        persona(length_of(layout.persona_open) + length_of(layout.persona_close)),
        no_persona(length_of(layout.no_persona)),
        speaker1(length_of(layout.speaker1_open) + length_of(layout.speaker1_close)),
        speaker2(length_of(layout.speaker2_open) + length_of(layout.speaker2_close)) {
    if (layout.persona_turn != collate::kNoTurn) {
      persona -= length_of(layout.speaker2_open);  // whose place it takes
      no_persona = 0;
    }
  }
};

// `sentence(i, count)` is the length of persona sentence i where `count` are kept, and
// `turn(i, count, has_persona)` that of the i-th turn from the end where `count` are kept, the one
// that is answered being the first.
template <typename Sentence, typename Turn>
Fit fit(const Around& around, int64_t num_sentences, Sentence&& sentence, int64_t num_turns,
        Turn&& turn, int64_t room) {
  const auto whole_turn = [&](int64_t i) {
    return turn(i, num_turns, false) + (i % 2 == 1 ? around.speaker2 : around.speaker1);
  };
  int64_t middle = 0, turns = 0;  // `middle`: all sentences but the first and the last
  for (int64_t i = 1; i + 1 < num_sentences; ++i) middle += sentence(i, num_sentences);
  for (int64_t i = 1; i <= num_turns; ++i) turns += whole_turn(i);
  const auto total = [&] {
    const int64_t count = num_turns;
    int64_t sum = around.all + turns;
    if (around.layout.partner_begins && count % 2 == 0) sum += around.speaker2;  // an empty turn
    if (num_sentences == 0) return sum + around.no_persona;
    sum += around.persona + sentence(0, num_sentences) + middle;
    if (num_sentences > 1) sum += sentence(num_sentences - 1, num_sentences);
    if (const int64_t at = collate::turn_of_persona(around.layout, count); at >= 0) {
      sum += turn(count - at, count, true) - turn(count - at, count, false);
    }
    return sum;
  };
  while (total() > room && num_turns > 1) {
    turns -= whole_turn(num_turns);
    --num_turns;
  }
  const int64_t alone = num_sentences > 0 ? around.persona + sentence(0, 1) : 0;
  const int64_t least = 0 < alone && alone <= around.no_persona ? 1 : 0;
  while (total() > room && num_sentences > least) {
    if (--num_sentences > 1) middle -= sentence(num_sentences - 1, num_sentences + 1);
  }
  if (total() <= room || num_turns == 0) return {num_sentences, num_turns, 0, total()};
  // Only the turn that is answered is left.
  const int64_t excess = total() - room;
  if (excess < turn(1, 1, false)) return {num_sentences, 1, excess, room};
  turns = num_turns = 0;
  return {num_sentences, 0, 0, total()};
}

// Fills one row of the plan (see PLAN_COLUMNS in convai_fast/ops/plan.py) and measures it.
inline RowSizes index_example(const SplitTables& t, const Layout& layout,
                              const IndexOptions& options, int64_t example, int64_t rotation,
                              PlanRow* plan, CutCounts* cuts) {
  const auto length_of = [&](int64_t utterance) {
    return t.utterance_offsets[utterance + 1] - t.utterance_offsets[utterance];
  };

  const int64_t last = t.candidate_offsets[example + 1];
  int64_t first = t.candidate_offsets[example];
  if (options.num_candidates > 0) first = std::max(first, last - options.num_candidates);
  int64_t longest_reply = 0;
  for (int64_t j = first; j < last; ++j) {
    longest_reply = std::max(longest_reply, length_of(t.candidate_ids[j] + layout.reply));
  }

  const int64_t persona_first = t.persona_offsets[t.dialogue[example]];
  const int64_t persona_count = t.persona_offsets[t.dialogue[example] + 1] - persona_first;
  rotation = persona_count > 0 ? rotation % persona_count : 0;
  const auto sentence = [&](int64_t i, int64_t count) {
    const int64_t source = persona_first + (i - rotation + persona_count) % persona_count;
    return length_of(t.persona_ids[source] + collate::place_of_sentence(layout, i, count));
  };
  const int64_t turns = std::min<int64_t>(t.history_count[example], options.history_turns);
  const int64_t history_end = t.history_first[example] + t.history_count[example];
  const auto turn = [&](int64_t from_end, int64_t count, bool has_persona) {
    const int64_t i = count - from_end;
    return length_of(t.history_ids[history_end - from_end] +
                     collate::place_of_turn(layout, i, count, has_persona));
  };

  // Beside the prefix stand the tokens before and after a reply.
  const Fit kept = fit(Around(layout, length_of), persona_count, sentence, turns, turn,
                       options.max_length - 2 - longest_reply);
  const int64_t reply_room = options.max_length - 2 - kept.num_tokens;
  cuts->history += kept.num_turns < turns || kept.num_skipped_tokens > 0;
  cuts->persona += kept.num_sentences < persona_count;
  cuts->reply += longest_reply > reply_room;

  const int64_t padded = kept.num_tokens + 2 + std::min(longest_reply, reply_room);
  int64_t shared = kept.num_tokens, labels = 0, is_cut = 0;
  for (int64_t j = first; j < last; ++j) {
    const int64_t reply = length_of(t.candidate_ids[j] + layout.reply);
    shared += 2 + std::min(reply, reply_room);
    // The true reply is the last one. Where it was cut it does not end: its eos has no label.
    is_cut = reply > reply_room;
    labels = is_cut ? reply_room : reply + 1;
  }

  *plan = {.persona_first = persona_first,
           .persona_count = persona_count,
           .persona_rotation = rotation,
           .persona_kept = kept.num_sentences,
           .history_first = history_end - kept.num_turns,
           .history_count = kept.num_turns,
           .history_skip = kept.num_skipped_tokens,
           .candidate_first = first,
           .candidate_count = last - first};
  return {static_cast<int32_t>(padded), static_cast<int32_t>(shared), static_cast<int32_t>(labels),
          static_cast<int32_t>(is_cut), static_cast<int32_t>(kept.num_tokens)};
}

}  // namespace convai_fast
