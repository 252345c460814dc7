"""What holds for every family."""

from itertools import chain

import pytest
import torch

from convai_fast.errors import UserError
from convai_fast.model import DoubleHeadsModel, TransformerConfig, families
from tests.helpers.model_peers import PEERS, ROTARY, make_peer


@pytest.mark.parametrize("architecture", [*PEERS, *ROTARY])
def test_every_parameter_has_its_name_in_transformers(architecture):
    """In a new model as in transformers' of the same config, and no other."""
    config = make_peer(architecture).config.to_dict()
    model = DoubleHeadsModel(TransformerConfig.from_transformers(config))
    family = families.of(model.config)
    names = family.tensor_names(model.config)
    assert names.keys() == {name for name, _ in model.named_parameters()}
    peer = family.peer(model.config.to_transformers())
    theirs = [*chain(*names.values())]
    assert {*theirs, "lm_head.weight"} == peer.state_dict().keys()
    kinds = ("Conv1D", "Linear")
    linear = [name for name, part in peer.named_modules() if type(part).__name__ in kinds]
    in_blocks = {f"{name}.weight" for name in linear if "head" not in name}
    assert in_blocks == set(filter(family.is_linear, theirs))


def test_constants_are_told_from_parameters(architecture):
    family = families.FAMILIES[architecture]
    _, is_mask = family.constant("transformer.h.11.attn.bias")
    assert is_mask(torch.ones(1, 1, 3, 3).tril())
    assert not is_mask(torch.ones(1, 1, 3, 3))
    assert not is_mask(torch.ones(10**6))  # without making a mask of that size
    assert family.constant("transformer.h.11.attn.c_attn.bias") is None


def test_a_family_is_named_where_none_fits():
    with pytest.raises(
        UserError, match="model_type is missing; set it to one of openai-gpt, gpt2,"
    ):
        families.find({"n_embd": 12}, ["transformer.h.0.ln_1.weight"])


def test_tensors_tell_the_family_of_an_old_config():
    assert families.find({}, ["wpe.weight"]).name == "gpt2"
    assert families.find({}, ["transformer.positions_embed.weight"]).name == "openai-gpt"
    assert families.find({"n_ctx": 1024}, ["positions_embed.weight"]).name == "openai-gpt"
