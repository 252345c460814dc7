#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/cached_attention/check.h"
#include "ops/decoder_step/decoder.h"
#include "ops/packed_linear/check.h"

namespace convai_fast::decoder_step {
namespace {

constexpr const char* kOp = "decoder_step";

using Tensors = c10::List<std::optional<at::Tensor>>;

// Takes the weights one after another, in the order of `PackedDecoder.tensors`; those of the layers
// are stacked, the first layer's first.
class Reader {
  // Tensors around the layers, of their norms, and of their products.
  static constexpr size_t kAround = 5, kNorms = 6, kProducts = 5 * 4;

 public:
  explicit Reader(const Tensors& tensors) : tensors_(tensors) {
    TORCH_CHECK_VALUE(tensors.size() == kAround + kNorms + kProducts, kOp, ": there must be ",
                      kAround + kNorms + kProducts, " weights, not ", tensors.size());
  }

  std::optional<at::Tensor> next() { return tensors_.get(next_++); }

  at::Tensor matrix(const char* name) {
    const auto tensor = next();
    TORCH_CHECK_VALUE(tensor.has_value(), kOp, ": ", name, " is missing");
    check_tensor(*tensor, name, at::kFloat, 2);
    return *tensor;
  }

  // Of each of `size` features, or null.
  const float* vector(const char* name, at::IntArrayRef stack, int64_t size) {
    return packed_linear::vector_of<float>(kOp, name, next(), stack, size);
  }

  // The norm of each head.
  Norm head_norm(const char* name, int64_t layers, int64_t head_dim, double eps) {
    return {vector(name, layers, head_dim), nullptr, static_cast<float>(eps), true};
  }

  // A norm's weight and bias; both are null where the weight is missing.
  Norm norm(at::IntArrayRef stack, int64_t size, double eps, bool rms) {
    const auto* weight = vector("the weight of a norm", stack, size);
    const auto* bias = vector("the bias of a norm", stack, size);
    return {weight, bias, static_cast<float>(eps), rms};
  }

  // A linear layer; of one that is missing, data is null.
  template <typename Scalar>
  Weight<Scalar> linear(at::IntArrayRef stack, int64_t in_features, int64_t out_features) {
    const auto data = next();
    packed_linear::Packed packed{.scales = next(), .column_sums = next(), .bias = next()};
    if (!data) return {};
    packed.data = *data;
    return packed_linear::weight_of<Scalar>(kOp, packed, stack, in_features, out_features);
  }

  // The type of the linear layers, by the first.
  at::Tensor first_linear() const {
    const auto first = tensors_.get(kAround + kNorms);
    TORCH_CHECK_VALUE(first.has_value(), kOp, ": a linear layer is missing");
    return *first;
  }

 private:
  const Tensors& tensors_;
  size_t next_ = 0;
};

void check_ids(const char* name, const at::Tensor& ids, int64_t tokens, int64_t most) {
  check_tensor(ids, name, at::kLong, 1);
  TORCH_CHECK_VALUE(ids.size(0) == tokens, kOp, ": ", name, " must have ", tokens, " values, not ",
                    ids.size(0));
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t id = ids.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_INDEX(id >= 0 && id < most, kOp, ": ", name, " holds ", id, ", but there are ",
                      most, " tokens");
  }
}

at::Tensor decoder_step_cpu(const at::Tensor& input_ids,
                            const std::optional<at::Tensor>& token_type_ids,
                            const at::Tensor& slots, const at::Tensor& offsets,
                            const at::Tensor& lengths, at::Tensor& keys, at::Tensor& values,
                            const Tensors& weights, int64_t num_heads, int64_t head_dim,
                            int64_t n_inner, bool pre_norm, bool rms_norm, double norm_eps,
                            c10::string_view activation, double rope_scale) {
  Reader reader(weights);
  const auto token_embedding = reader.matrix("token_embedding");
  const auto position_embedding = reader.next();
  const int64_t n_embd = token_embedding.size(1), tokens = input_ids.numel();
  if (position_embedding) {
    check_tensor(*position_embedding, "position_embedding", at::kFloat, 2);
    TORCH_CHECK_VALUE(position_embedding->size(1) == n_embd, kOp, ": position_embedding must be ",
                      n_embd, " wide");
  }
  check_ids("input_ids", input_ids, tokens, token_embedding.size(0));
  if (token_type_ids) check_ids("token_type_ids", *token_type_ids, tokens, token_embedding.size(0));

  TORCH_CHECK_VALUE(keys.dim() == 7 && values.dim() == 7 && keys.size(0) == values.size(0) &&
                        keys.size(0) > 0 && keys.is_contiguous() && values.is_contiguous(),
                    kOp, ": keys ", keys.sizes(), " and values ", values.sizes(), " must be those ",
                    "of `cached_attention` for each layer, and contiguous");
  TORCH_CHECK_TYPE(values.scalar_type() == keys.scalar_type(), kOp, ": values must be ",
                   keys.scalar_type(), ", as keys are");
  const int64_t num_kv_heads = keys.size(2);
  TORCH_CHECK_VALUE(num_heads > 0 && head_dim > 0 && num_kv_heads > 0 &&
                        num_heads % num_kv_heads == 0 && n_inner > 0,
                    kOp, ": ", num_heads, " heads of ", head_dim, " do not fit keys ", keys.sizes(),
                    " and a middle of ", n_inner);
  const int64_t capacity = cached_attention::check_cache(kOp, keys[0], values[0], head_dim);
  const float* rope_frequencies = reader.vector("rope_frequencies", {}, head_dim / 2);
  TORCH_CHECK_VALUE(!rope_frequencies || head_dim % 2 == 0, kOp,
                    ": rotary positions need heads of an even width, not ", head_dim);

  Step step{.input_ids = input_ids.const_data_ptr<int64_t>(),
            .token_type_ids = token_type_ids ? token_type_ids->const_data_ptr<int64_t>() : nullptr,
            .tokens = tokens,
            .sequences = cached_attention::check_runs(kOp, slots, offsets, lengths, tokens,
                                                      keys.size(1), capacity),
            .capacity = capacity};
  for (const auto& sequence : step.sequences) {
    const int64_t end = sequence.length + sequence.end - sequence.first;
    TORCH_CHECK_INDEX(sequence.end > sequence.first, kOp, ": a sequence has no new token");
    TORCH_CHECK_INDEX(!position_embedding || end <= position_embedding->size(0), kOp,
                      ": a sequence has ", end, " tokens, but there are ",
                      position_embedding ? position_embedding->size(0) : 0, " positions");
  }

  auto hidden = at::empty({slots.size(0), n_embd}, token_embedding.options());
  packed_linear::for_format(kOp, reader.first_linear(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    const int64_t num_layers = keys.size(0), heads_width = num_heads * head_dim;
    const Decoder<Scalar> decoder{
        .token_embedding = token_embedding.const_data_ptr<float>(),
        .position_embedding =
            position_embedding ? position_embedding->const_data_ptr<float>() : nullptr,
        .rope_frequencies = rope_frequencies,
        .final_norm = reader.norm({}, n_embd, norm_eps, rms_norm),
        .first_layer = {.attention_norm = reader.norm(num_layers, n_embd, norm_eps, rms_norm),
                        .mlp_norm = reader.norm(num_layers, n_embd, norm_eps, rms_norm),
                        .q_norm =
                            reader.head_norm("the norm of queries", num_layers, head_dim, norm_eps),
                        .k_norm =
                            reader.head_norm("the norm of keys", num_layers, head_dim, norm_eps),
                        .qkv = reader.linear<Scalar>(num_layers, n_embd,
                                                     heads_width + 2 * num_kv_heads * head_dim),
                        .out = reader.linear<Scalar>(num_layers, heads_width, n_embd),
                        .gate = reader.linear<Scalar>(num_layers, n_embd, n_inner),
                        .up = reader.linear<Scalar>(num_layers, n_embd, n_inner),
                        .down = reader.linear<Scalar>(num_layers, n_inner, n_embd)},
        .num_layers = num_layers,
        .n_embd = n_embd,
        .n_inner = n_inner,
        .num_heads = num_heads,
        .num_kv_heads = num_kv_heads,
        .head_dim = head_dim,
        .pre_norm = pre_norm,
        .activation = packed_linear::activation_of(kOp, activation),
        .rope_scale = static_cast<float>(rope_scale)};
    const auto& [attention_norm, mlp_norm, q_norm, k_norm, qkv, out, gate, up, down] =
        decoder.first_layer;
    TORCH_CHECK_VALUE(attention_norm.weight && mlp_norm.weight, kOp,
                      ": the weight of a norm is missing");
    TORCH_CHECK_VALUE(!q_norm.weight == !k_norm.weight, kOp,
                      ": queries and keys must both have a norm, or none");
    TORCH_CHECK_VALUE(qkv.data && out.data && up.data && down.data, kOp,
                      ": a linear layer is missing");
    for_scalar(keys, [&](auto kept) {
      using Kept = decltype(kept);
      run(decoder, step, static_cast<Kept*>(keys.mutable_data_ptr()), keys.stride(0),
          static_cast<Kept*>(values.mutable_data_ptr()), values.stride(0),
          hidden.mutable_data_ptr<float>());
    });
  });
  return hidden;
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) { m.impl("decoder_step", &decoder_step_cpu); }

}  // namespace convai_fast::decoder_step
