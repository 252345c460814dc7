"""`convai-fast demo`."""

from convai_fast.cli.demo import prime_attention
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel


def test_the_demo_primes_only_the_first_layer(tokenizer):
    config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 400}
    model = DoubleHeadsModel(TransformerConfig.from_transformers(config))
    prime_attention(model)
    first, second = (block.attention.qkv.weight.chunk(3) for block in model.transformer.blocks)
    assert (first[0] == first[1]).all()
    assert not (second[0] == second[1]).any()
