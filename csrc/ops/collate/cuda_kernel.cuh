// `collate` on a GPU: no torch.
#pragma once

#include "ops/collate/layout.h"
#include "ops/device_assert.cuh"

namespace convai_fast::collate {

constexpr int kThreads = 128;
constexpr int kBlocksOfSm = 8;  // unasked, the compiler makes room for more on sm_90, and spills

// What a block's threads do together for each part of a prefix.
template <typename Token>
__device__ int64_t write_prefix_together(const Input<Token>& in, const PlanRow& plan, int64_t* ids,
                                         int64_t* segments, int64_t limit) {
  const auto write = [&](int64_t position, const Token* source, int64_t length, int64_t segment) {
    for (int64_t k = threadIdx.x; k < length; k += kThreads) {
      ids[position + k] = source[k];
      segments[position + k] = segment;
    }
  };
  assert(skips_within_a_turn(in, plan) && "collate: history_skip points outside");
  const int64_t prefix = walk_prefix(in, plan, limit, write);
  assert((plan.candidate_count == 0 || prefix + 2 <= in.max_length) &&
         "collate: a prefix does not fit max_length");
  return prefix;
}

// A candidate's own part, the token before its reply, the reply and eos, token by token.
template <typename Token>
struct ReplyPart {
  Reply<Token> reply{};
  int64_t length = 0;  // of the whole part; 0 where there is no candidate

  ReplyPart() = default;
  __device__ ReplyPart(const Input<Token>& in, int32_t candidate, int64_t prefix)
      : reply(reply_of(in, candidate, in.max_length - prefix - 2)), length(reply.length + 2) {}
  __device__ int64_t token(const Layout& layout, int64_t k) const {
    return k == 0            ? layout.reply_begin
           : k + 1 == length ? layout.eos
                             : static_cast<int64_t>(reply.tokens[k - 1]);
  }
  __device__ bool has_label(int64_t k) const { return 0 < k && k <= reply.num_labels; }
};

// One block a candidate: its threads share out the tokens of each part. Nothing but the plan comes
// from the host, so that a step costs one small copy and one launch.
template <typename Token>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm)
    collate_kernel(const Input<Token> in, const PaddedOutput out) {
  const int64_t row = blockIdx.x;
  const int64_t i = row / in.num_candidates, j = row % in.num_candidates;
  const PlanRow& plan = in.plan[i];
  int64_t* ids = out.input_ids + row * in.seq_len;
  int64_t* segments = out.token_type_ids + row * in.seq_len;
  int64_t* labels = out.labels + row * in.seq_len;

  int64_t prefix = 0;
  ReplyPart<Token> part;
  if (j < plan.candidate_count) {
    prefix = write_prefix_together(in, plan, ids, segments, in.seq_len);
    part = ReplyPart<Token>(in, in.candidate_ids[plan.candidate_first + j], prefix);
  }
  const bool labelled = j + 1 == plan.candidate_count;  // the true reply is the last one
  for (int64_t k = threadIdx.x; k < in.seq_len; k += kThreads) {
    int64_t label = kIgnoredLabel;
    if (k >= prefix) {
      const bool inside = k - prefix < part.length;
      const int64_t token = inside ? part.token(in.layout, k - prefix) : in.layout.pad;
      ids[k] = token;
      segments[k] = inside ? in.layout.speaker1 : in.layout.pad;
      if (labelled && part.has_label(k - prefix)) label = token;
    }
    labels[k] = label;
  }
  if (threadIdx.x == 0) out.mc_token_ids[row] = prefix + part.length - 1;
}

// One block an example, part after part.
template <typename Token>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm)
    collate_shared_kernel(const Input<Token> in, const SharedOutput out) {
  const PlanRow& plan = in.plan[blockIdx.x];
  const int64_t first = in.offsets[blockIdx.x], last = in.offsets[blockIdx.x + 1];
  int64_t* mc_token_ids = out.mc_token_ids + blockIdx.x * in.num_candidates;

  const int64_t prefix = write_prefix_together(in, plan, out.input_ids + first,
                                               out.token_type_ids + first, last - first);
  assert(first + prefix <= last && "collate: a row does not fit its offsets");
  for (int64_t k = threadIdx.x; k < prefix; k += kThreads) {
    out.position_ids[first + k] = k;
    out.branch_ids[first + k] = 0;
    out.labels[first + k] = kIgnoredLabel;
  }
  int64_t end = first + prefix;
  for (int64_t j = 0; j < plan.candidate_count; ++j) {
    const ReplyPart<Token> part(in, in.candidate_ids[plan.candidate_first + j], prefix);
    assert(end + part.length <= last && "collate: a row does not fit its offsets");
    const bool labelled = j + 1 == plan.candidate_count;  // the true reply is the last one
    for (int64_t k = threadIdx.x; k < part.length; k += kThreads) {
      const int64_t token = part.token(in.layout, k);
      out.input_ids[end + k] = token;
      out.token_type_ids[end + k] = in.layout.speaker1;
      out.position_ids[end + k] = prefix + k;
      out.branch_ids[end + k] = j + 1;
      out.labels[end + k] = labelled && part.has_label(k) ? token : kIgnoredLabel;
    }
    end += part.length;
    if (threadIdx.x == 0) mc_token_ids[j] = end - 1;
  }
  assert(end == last && "collate: a row does not fill its offsets");
  for (int64_t j = plan.candidate_count + threadIdx.x; j < in.num_candidates; j += kThreads) {
    mc_token_ids[j] = -1;
  }
}

}  // namespace convai_fast::collate
