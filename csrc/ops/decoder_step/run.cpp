// The passes of a step. There are four of products a layer, and attention between them:
//
//   queries, keys and values   norm, product
//   attention                  which stores the keys and values
//   its output                 product, added to the hidden states
//   the MLP's middle           norm, products with their activation
//   the MLP's output           product, added to the hidden states
//
// Norms after the sum (as OpenAI GPT has them), and norms and rotary positions of the heads are
// passes of their own. What is not attention needs no other row. So where rows are many, a thread
// takes some of them from one attention to the next while they stay in its cache; where they are
// few, the threads share each pass.
#include <ATen/Parallel.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "ops/cached_attention/attend.h"
#include "ops/decoder_step/decoder.h"
#include "ops/packed_linear/product.h"
#include "ops/rotate/rotate.h"
#include "ops/scratch.h"

namespace convai_fast::decoder_step {
namespace {

using cached_attention::Run;
using packed_linear::multiply;
using packed_linear::multiply_gated;
using packed_linear::normalize;

// What lies between the passes, kept by the thread that calls for its next step.
struct Scratch {
  std::vector<float> x, qkv, attended, rotation;
};

// Rows that a thread takes together: of more, what lies between the products leaves its cache; by
// fewer, the weights are read too often.
constexpr int64_t kMostTogether = 256, kLeastTogether = 48;

// Calls function(first, count) for all rows: for some of them by each thread, or, where they are
// too few, for all by this one, whose passes the threads share.
template <typename Function>
void for_rows(int64_t rows, const Function& function) {
  const int64_t threads = at::get_num_threads();
  if (rows < threads * kLeastTogether) return function(0, rows);
  const int64_t rounds = (rows + threads * kMostTogether - 1) / (threads * kMostTogether);
  const int64_t together = (rows + threads * rounds - 1) / (threads * rounds);
  std::atomic<int64_t> taken{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t first; (first = taken.fetch_add(together)) < rows;) {
      function(first, std::min(together, rows - first));
    }
  });
}

template <typename Function>
void for_tokens(const Step& step, const Function& function) {
  constexpr int64_t kSequencesPerTask = 16;
  at::parallel_for(0, step.sequences.size(), kSequencesPerTask, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      const Run& run = step.sequences[i];
      for (int64_t row = run.first; row < run.end; ++row) {
        function(row, run.length + row - run.first);
      }
    }
  });
}

template <typename Scalar>
void embed(const Decoder<Scalar>& decoder, const Step& step, float* x) {
  const int64_t n = decoder.n_embd;
  for_tokens(step, [&](int64_t row, int64_t position) {
    const float* token = decoder.token_embedding + step.input_ids[row] * n;
    float* to = x + row * n;
    std::copy_n(token, n, to);
    if (step.token_type_ids) {
      const float* segment = decoder.token_embedding + step.token_type_ids[row] * n;
      for (int64_t k = 0; k < n; ++k) to[k] += segment[k];
    }
    if (decoder.position_embedding) {
      const float* place = decoder.position_embedding + position * n;
      for (int64_t k = 0; k < n; ++k) to[k] += place[k];
    }
  });
}

// Cosines and sines of each token's angles, [tokens, head_dim]: of one half of a head each.
template <typename Scalar>
void fill_rotation(const Decoder<Scalar>& decoder, const Step& step, float* rotation) {
  const int64_t half = decoder.head_dim / 2;
  for_tokens(step, [&](int64_t row, int64_t position) {
    float* cosines = rotation + row * decoder.head_dim;
    for (int64_t k = 0; k < half; ++k) {  // angles in float32, as transformers makes them
      const float angle = static_cast<float>(position) * decoder.rope_frequencies[k];
      cosines[k] = decoder.rope_scale * std::cos(angle);
      cosines[half + k] = decoder.rope_scale * std::sin(angle);
    }
  });
}

// Normalizes and turns the queries and keys of each token, which lie at the beginning of its row of
// qkv, where the decoder does.
template <typename Scalar>
void place_heads(const Decoder<Scalar>& decoder, const Layer<Scalar>& layer, int64_t rows,
                 const float* rotation, float* qkv) {
  if (!rotation && !layer.q_norm.weight) return;
  constexpr int64_t kRowsPerTask = 16;
  const int64_t head_dim = decoder.head_dim, heads = decoder.num_heads;
  at::parallel_for(0, rows, kRowsPerTask, [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      float *q = qkv + row * decoder.qkv_width(), *k = q + heads * head_dim;
      if (layer.q_norm.weight) {
        packed_linear::normalize_rows(q, heads, head_dim, layer.q_norm);
        packed_linear::normalize_rows(k, decoder.num_kv_heads, head_dim, layer.k_norm);
      }
      if (rotation) {
        const float *cosines = rotation + row * head_dim, *sines = cosines + head_dim / 2;
        rotate::rotate_heads(q, cosines, sines, head_dim / 2, heads + decoder.num_kv_heads, q);
      }
    }
  });
}

template <typename Scalar, typename Kept>
void attend(const Decoder<Scalar>& decoder, const Step& step, const std::vector<Run>& sequences,
            const float* qkv, Kept* keys, Kept* values, float* attended) {
  RECORD_USER_SCOPE("convai_fast::attention");  // which a profile of PyTorch's shows
  const int64_t width = decoder.qkv_width(), head_dim = decoder.head_dim;
  const float *k = qkv + decoder.num_heads * head_dim, *v = k + decoder.num_kv_heads * head_dim;
  cached_attention::attend<Kept>({.q = {qkv, width, head_dim},
                                  .k = {k, width, head_dim},
                                  .v = {v, width, head_dim},
                                  .keys = keys,
                                  .values = values,
                                  .out = {attended, decoder.heads_width(), head_dim},
                                  .num_kv_heads = decoder.num_kv_heads,
                                  .group = decoder.num_heads / decoder.num_kv_heads,
                                  .capacity = step.capacity},
                                 sequences);
}

// From hidden states x [rows, n_embd] to a layer's queries, keys and values.
template <typename Scalar>
void project(const Decoder<Scalar>& decoder, const Layer<Scalar>& layer, int64_t rows,
             const float* x, const float* rotation, float* qkv) {
  multiply(x, decoder.n_embd, rows, decoder.pre_norm ? &layer.attention_norm : nullptr, layer.qkv,
           {.data = qkv, .stride = decoder.qkv_width()});
  place_heads(decoder, layer, rows, rotation, qkv);
}

template <typename Scalar>
void run_mlp(const Decoder<Scalar>& decoder, const Layer<Scalar>& layer, int64_t rows, float* x) {
  static thread_local std::vector<float> middle;
  const int64_t n = decoder.n_embd, n_inner = decoder.n_inner;
  const Norm* norm = decoder.pre_norm ? &layer.mlp_norm : nullptr;
  float* inner = at_least(middle, rows * n_inner);
  const packed_linear::Results results{
      .data = inner, .stride = n_inner, .activation = decoder.activation};
  if (layer.gate.data) {
    multiply_gated(x, n, rows, norm, layer.gate, layer.up, results);
  } else {
    multiply(x, n, rows, norm, layer.up, results);
  }
  multiply<Scalar>(inner, n_inner, rows, nullptr, layer.down,
                   {.data = x, .stride = n, .residual = x});
  if (!decoder.pre_norm) normalize(x, rows, n, layer.mlp_norm);
}

// The hidden states after a layer, where x has those before it.
template <typename Scalar>
void run_after_attention(const Decoder<Scalar>& decoder, const Layer<Scalar>& layer, int64_t rows,
                         const float* attended, float* x) {
  const int64_t n = decoder.n_embd;
  multiply<Scalar>(attended, decoder.heads_width(), rows, nullptr, layer.out,
                   {.data = x, .stride = n, .residual = x});
  if (!decoder.pre_norm) normalize(x, rows, n, layer.attention_norm);
  run_mlp(decoder, layer, rows, x);
}

}  // namespace

template <typename Scalar, typename Kept>
void run(const Decoder<Scalar>& decoder, const Step& step, Kept* keys, int64_t keys_stride,
         Kept* values, int64_t values_stride, float* hidden) {
  static thread_local Scratch scratch;
  const int64_t n = decoder.n_embd, width = decoder.qkv_width(), head_dim = decoder.head_dim;
  int64_t rows = step.tokens;
  float* x = at_least(scratch.x, rows * n);
  float* qkv = at_least(scratch.qkv, rows * width);
  float* attended = at_least(scratch.attended, rows * decoder.heads_width());
  float* rotation =
      decoder.rope_frequencies ? at_least(scratch.rotation, rows * head_dim) : nullptr;
  const auto project_to = [&](int64_t layer, int64_t first, int64_t count) {
    project(decoder, decoder.first_layer.of_stack(layer, head_dim), count, x + first * n,
            rotation ? rotation + first * head_dim : nullptr, qkv + first * width);
  };

  embed(decoder, step, x);
  if (rotation) fill_rotation(decoder, step, rotation);
  for_rows(rows, [&](int64_t first, int64_t count) { project_to(0, first, count); });
  std::vector<Run> sequences = step.sequences;
  for (int64_t i = 0; i < decoder.num_layers; ++i) {
    const bool is_last = i == decoder.num_layers - 1;
    if (is_last) {  // nobody looks at the others after it
      rows = 0;
      for (Run& sequence : sequences) {
        sequence.query = sequence.end - 1;
        sequence.out = rows++;
        std::copy_n(x + sequence.query * n, n, x + sequence.out * n);
      }
    }
    attend(decoder, step, sequences, qkv, keys, values, attended);
    keys += keys_stride;
    values += values_stride;
    for_rows(rows, [&](int64_t first, int64_t count) {
      run_after_attention(decoder, decoder.first_layer.of_stack(i, head_dim), count,
                          attended + first * decoder.heads_width(), x + first * n);
      if (!is_last) project_to(i + 1, first, count);
    });
  }
  if (decoder.final_norm.weight) normalize(x, rows, n, decoder.final_norm);
  std::copy_n(x, rows * n, hidden);
}

#define CONVAI_FAST_RUN(Scalar, Kept) \
  template void run(const Decoder<Scalar>&, const Step&, Kept*, int64_t, Kept*, int64_t, float*);
CONVAI_FAST_RUN(float, float)
CONVAI_FAST_RUN(float, simd::BFloat16)
CONVAI_FAST_RUN(simd::BFloat16, float)
CONVAI_FAST_RUN(simd::BFloat16, simd::BFloat16)
CONVAI_FAST_RUN(int8_t, float)
CONVAI_FAST_RUN(int8_t, simd::BFloat16)
#undef CONVAI_FAST_RUN

}  // namespace convai_fast::decoder_step
