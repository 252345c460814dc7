"""The schema of every operator, defined once.

The plain PyTorch reference is registered beneath (`CompositeExplicitAutograd`, any device); a
compiled module adds kernels for CPU and CUDA that take over as soon as it is loaded. So an install
without a compiler has the same operators, and the same graph under `torch.compile`.
"""

import torch

library = torch.library.Library("convai_fast", "DEF")

library.define(
    "collate(Tensor tokens, Tensor utterance_offsets, Tensor persona_ids, Tensor history_ids,"
    " Tensor candidate_ids, Tensor plan, Tensor layout, int num_candidates, int seq_len,"
    " bool pin_memory=False)"
    " -> (Tensor input_ids, Tensor token_type_ids, Tensor labels, Tensor mc_token_ids)"
)

library.define(
    "collate_shared(Tensor tokens, Tensor utterance_offsets, Tensor persona_ids,"
    " Tensor history_ids, Tensor candidate_ids, Tensor plan, Tensor layout, int num_candidates,"
    " Tensor offsets, int num_tokens, int max_length, bool pin_memory=False)"
    " -> (Tensor input_ids, Tensor token_type_ids, Tensor position_ids, Tensor branch_ids,"
    " Tensor labels, Tensor mc_token_ids)"
)

library.define(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p,"
    " Tensor seeds, Tensor steps, bool return_logprobs) -> (Tensor token_ids, Tensor logprobs)"
)

library.define(
    "packed_linear(Tensor x, Tensor weight, Tensor? scales, Tensor? column_sums, Tensor? bias,"
    " int out_features, str? activation) -> Tensor"
)
library.define("packed_linear_instructions(Tensor weight) -> str")

library.define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values,"
    " Tensor slots, Tensor offsets, Tensor lengths) -> Tensor"
)

library.define(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values,"
    " Tensor slots, Tensor lengths) -> Tensor"
)

library.define(
    "decoder_step(Tensor input_ids, Tensor? token_type_ids, Tensor slots, Tensor offsets,"
    " Tensor lengths, Tensor(a!) keys, Tensor(b!) values, Tensor?[] weights, int num_heads,"
    " int head_dim, int n_inner, bool pre_norm, bool rms_norm, float norm_eps, str activation,"
    " float rope_scale) -> Tensor"
)

library.define(
    "add_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, bool rms_norm)"
    " -> (Tensor sum, Tensor normed)"
)

library.define(
    "branch_attention(Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor branch_ids,"
    " float dropout_p, Tensor? seed, Tensor? key_ids, Tensor? cu_queries, Tensor? cu_keys,"
    " SymInt max_queries, SymInt max_keys) -> (Tensor out, Tensor logsumexp)"
)

library.define(
    "branch_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor logsumexp, Tensor offsets, Tensor branch_ids, float dropout_p, Tensor? seed)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)"
)

library.define("dropout(Tensor x, float p, Tensor seed) -> Tensor")

library.define("linear(Tensor x, Tensor weight, Tensor? bias, bool in_float32) -> Tensor")

library.define(
    "linear_backward(Tensor grad, Tensor? x, Tensor weight, bool in_float32, bool[3] wanted)"
    " -> (Tensor for_x, Tensor for_weight, Tensor for_bias)"
)

library.define("gelu(Tensor x) -> Tensor")
library.define("gelu_backward(Tensor grad, Tensor x) -> Tensor")

library.define("swiglu(Tensor gate, Tensor up) -> Tensor")
library.define("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)")

library.define("rms_norm(Tensor x, Tensor weight, float eps, ScalarType dtype) -> Tensor")
library.define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps)"
    " -> (Tensor for_x, Tensor for_weight)"
)

library.define("rotate(Tensor x, Tensor cosines, Tensor sines) -> Tensor")
