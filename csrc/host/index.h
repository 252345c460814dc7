// Cuts every example of a split to what the model can read, and measures it. Torch-free.
#pragma once

#include <algorithm>
#include <cstdint>

#include "convai_fast/collate.h"

namespace convai_fast {

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
  int32_t labels;  // the true reply and <eos>
};
constexpr int64_t kSizeColumns = sizeof(RowSizes) / sizeof(int32_t);

// Fills one row of the plan (see PLAN_COLUMNS in convai_fast/ops/collate.py) and measures it.
inline RowSizes index_example(const SplitTables& t, const IndexOptions& options, int64_t example,
                              int64_t rotation, PlanRow* plan, CutCounts* cuts) {
  const auto length_of = [&](int32_t utterance) {
    return t.utterance_offsets[utterance + 1] - t.utterance_offsets[utterance];
  };

  const int64_t last = t.candidate_offsets[example + 1];
  int64_t first = t.candidate_offsets[example];
  if (options.num_candidates > 0) first = std::max(first, last - options.num_candidates);
  int64_t longest_reply = 0;
  for (int64_t j = first; j < last; ++j) {
    longest_reply = std::max(longest_reply, length_of(t.candidate_ids[j]));
  }
  const int64_t reply_part = 1 + longest_reply + 1;  // <speaker1> reply <eos>

  const int64_t persona_first = t.persona_offsets[t.dialogue[example]];
  const int64_t persona_count = t.persona_offsets[t.dialogue[example] + 1] - persona_first;
  rotation = persona_count > 0 ? rotation % persona_count : 0;
  const auto sentence = [&](int64_t i) {
    return length_of(t.persona_ids[persona_first + (i - rotation + persona_count) % persona_count]);
  };
  int64_t persona_kept = persona_count;
  int64_t total = 1 + reply_part;  // <bos> and the reply
  for (int64_t i = 0; i < persona_count; ++i) total += sentence(i);

  const int64_t all_turns = t.history_count[example];
  int64_t turns = std::min(all_turns, options.history_turns);
  const auto turn = [&](int64_t from_end) {
    return 1 + length_of(t.history_ids[t.history_first[example] + all_turns - from_end]);
  };
  for (int64_t k = 1; k <= turns; ++k) total += turn(k);

  // The turn that is being answered goes last: a reply to nothing teaches nothing.
  bool history_cut = false;
  while (total > options.max_length && turns > 1) {
    total -= turn(turns--);
    history_cut = true;
  }
  cuts->persona += total > options.max_length && persona_kept > 0;
  while (total > options.max_length && persona_kept > 0) total -= sentence(--persona_kept);
  if (total > options.max_length && turns == 1) {
    total -= turn(turns--);
    history_cut = true;
  }
  cuts->history += history_cut;
  const int64_t prefix = total - reply_part;
  if (total > options.max_length) {
    total = options.max_length;
    ++cuts->reply;
  }
  int64_t shared = prefix, labels = 0;
  for (int64_t j = first; j < last; ++j) {
    const int64_t reply = std::min(length_of(t.candidate_ids[j]), total - prefix - 2);
    shared += 1 + reply + 1;
    labels = reply + 1;  // the true reply is the last one
  }

  *plan = {persona_first,
           persona_count,
           rotation,
           persona_kept,
           t.history_first[example] + all_turns - turns,
           turns,
           first,
           last - first};
  return {static_cast<int32_t>(total), static_cast<int32_t>(shared), static_cast<int32_t>(labels)};
}

}  // namespace convai_fast
