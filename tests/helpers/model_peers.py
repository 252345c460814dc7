"""transformers' models of all families, and batches of random ids for them."""

from types import SimpleNamespace

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from convai_fast.model import families

transformers.utils.logging.disable_progress_bar()

PEERS = {
    "openai-gpt": (transformers.OpenAIGPTConfig, transformers.OpenAIGPTDoubleHeadsModel),
    "gpt2": (transformers.GPT2Config, transformers.GPT2DoubleHeadsModel),
}
# Of a model with rotary positions; its groups have two heads, and not all width is in its heads.
SIZES = dict(
    vocab_size=101,
    max_position_embeddings=40000,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    intermediate_size=56,
)
# A family, and what makes its models differ.
ROTARY = {
    "llama": ("llama", dict(tie_word_embeddings=True)),
    "llama-3.1": (
        "llama",
        dict(
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=500.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=5000,
            ),
            num_key_value_heads=4,
        ),
    ),
    "llama-biases": (
        "llama",
        dict(attention_bias=True, mlp_bias=True, hidden_act="gelu", rms_norm_eps=1e-3)
        | dict(rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=4.0)),
    ),
    "mistral": (
        "mistral",
        dict(sliding_window=40000)
        | dict(rope_parameters=dict(rope_type="dynamic", rope_theta=900.0, factor=2.0)),
    ),
    "qwen2": (
        "qwen2",
        dict(tie_word_embeddings=True, num_key_value_heads=1, head_dim=8)
        | dict(
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=1e4,
                factor=4.0,
                original_max_position_embeddings=10000,
            )
        ),
    ),
    "qwen3": ("qwen3", dict(attention_bias=True)),
}


def make_peer(architecture, seed=0, noise=0.05, **settings):
    """transformers' double-heads model with random values in every parameter, biases included.

    `architecture` is one of `PEERS` or of `ROTARY`.
    """
    torch.manual_seed(seed)
    if architecture in PEERS:
        config_class, model_class = PEERS[architecture]
        sizes = dict(vocab_size=101, n_positions=48, n_embd=32, n_layer=2, n_head=4)
        sizes |= dict(bos_token_id=None, eos_token_id=None)  # these would be outside the vocabulary
        peer = model_class(config_class(**(sizes | settings))).eval()
    else:
        family, own = ROTARY[architecture]
        peer = families.FAMILIES[family].peer(SIZES | own | settings).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return peer


def make_batch(vocab_size, batch=3, num_candidates=4, seq_len=29, seed=0):
    """A right-padded batch with segment ids, where only the last candidate has labels."""
    generator = torch.Generator().manual_seed(seed)

    def randint(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    pad, speaker1, speaker2 = vocab_size - 1, vocab_size - 3, vocab_size - 2
    shape = (batch, num_candidates, seq_len)
    lengths = randint(seq_len // 2, seq_len + 1, batch, num_candidates)
    is_real = torch.arange(seq_len) < lengths[..., None]
    input_ids = torch.where(is_real, randint(0, vocab_size, *shape), pad)
    is_reply = is_real & (torch.arange(seq_len) >= lengths[..., None] - 6)
    is_reply[:, :-1] = False
    return SimpleNamespace(
        inputs=dict(
            input_ids=input_ids,
            token_type_ids=torch.where(is_real, randint(speaker1, speaker2 + 1, *shape), pad),
            mc_token_ids=lengths - 1,
            labels=torch.where(is_reply, input_ids, -100),
            mc_labels=randint(0, num_candidates, batch),
        ),
        is_real=is_real,
    )


def relative_error(actual, expected):
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def gradients_by_our_names(peer, config):
    """transformers' gradients in our layout: a Conv1D stores its weight transposed."""

    def gradient(name):
        module, _, kind = name.rpartition(".")
        module = peer.get_submodule(module)
        found = getattr(module, kind).grad
        return found.t() if isinstance(module, Conv1D) else found

    gradients = {
        ours: torch.cat([gradient(name) for name in theirs])
        for ours, theirs in families.of(config).tensor_names(config).items()
    }
    embedding = peer.get_input_embeddings().weight.grad
    return gradients | {"transformer.token_embedding.weight": embedding}


def assert_gradients(model, peer):
    """The gradient of every parameter is that of transformers' model."""
    gradients = gradients_by_our_names(peer, model.config)
    # A bias that all candidates share moves no probability: its gradient is 0 but for rounding.
    bias = model.multiple_choice_head.bias.grad - gradients.pop("multiple_choice_head.bias")
    assert bias.norm() <= 1e-4 * model.transformer.blocks[0].mlp.up.weight.grad.norm()
    for name, gradient in gradients.items():
        if gradient.norm() == 0:  # of the multiple-choice head, where there is no choice
            assert model.get_parameter(name).grad.norm() == 0, name
        else:
            assert relative_error(model.get_parameter(name).grad, gradient) < 1e-4, name
    assert len(gradients) + 1 == len(list(model.parameters()))
