// A decoder as `decoder_step` runs it: its weights, and what a step is given.
#pragma once

#include <array>
#include <vector>

#include "ops/cached_attention/arguments.h"
#include "ops/packed_linear/arguments.h"

namespace convai_fast::decoder_step {

using packed_linear::Activation;
using packed_linear::Norm;
using packed_linear::Weight;

template <typename Scalar>
struct Layer {
  Norm attention_norm, mlp_norm;
  Norm q_norm, k_norm;                      // of a head; their weights are null without them
  Weight<Scalar> qkv, out, gate, up, down;  // gate.data is null without one

  // Layer `i`, of a stack of which this is the first.
  Layer of_stack(int64_t i, int64_t head_dim) const {
    const int64_t n_embd = qkv.in_features;
    return {attention_norm.of_layer(i, n_embd),
            mlp_norm.of_layer(i, n_embd),
            q_norm.of_layer(i, head_dim),
            k_norm.of_layer(i, head_dim),
            qkv.of_layer(i),
            out.of_layer(i),
            gate.of_layer(i),
            up.of_layer(i),
            down.of_layer(i)};
  }
};

template <typename Scalar>
struct Decoder {
  const float* token_embedding;     // [vocab_size, n_embd]
  const float* position_embedding;  // [n_positions, n_embd] or null
  const float* rope_frequencies;    // [head_dim / 2], of rotary positions, or null
  Norm final_norm;                  // its weight is null without one
  Layer<Scalar> first_layer;        // of the stack
  int64_t num_layers, n_embd, n_inner, num_heads, num_kv_heads, head_dim;
  bool pre_norm;
  Activation activation;
  float rope_scale;  // of cosines and sines

  int64_t heads_width() const { return num_heads * head_dim; }
  int64_t qkv_width() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
};

// The new tokens of some sequences, one sequence after another, and the cache.
struct Step {
  const int64_t* input_ids;
  const int64_t* token_type_ids;  // or null
  int64_t tokens;
  std::vector<cached_attention::Run> sequences;
  int64_t capacity;  // of a slot
};

// Hidden states of each sequence's last token, to hidden [sequences, n_embd]. Keys and values of
// all new tokens are stored in the cache, that of a layer `keys_stride` or `values_stride` after
// that of the one before.
template <typename Scalar, typename Kept>
void run(const Decoder<Scalar>& decoder, const Step& step, Kept* keys, int64_t keys_stride,
         Kept* values, int64_t values_stride, float* hidden);

}  // namespace convai_fast::decoder_step
