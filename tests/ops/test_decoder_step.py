"""`decoder_step` against its reference, for every kind of decoder."""

import dataclasses
import itertools

import pytest
import torch

from convai_fast import ops
from convai_fast.model import DoubleHeadsModel, TransformerConfig
from convai_fast.model.config import Rope
from convai_fast.model.packed import pack_decoder
from convai_fast.ops import reference
from tests.helpers.branches import needs_kernels

GPT2 = dict(model_type="gpt2", vocab_size=101, n_positions=96, n_embd=48, n_layer=2, n_head=4)
ROPE = Rope(tuple(500.0 ** -(k / 6) for k in range(6)), 1.1, {})  # for heads of 12
# What makes decoders differ, each change by itself.
CHANGES = {
    "gpt2": {},
    "norms after the sums": dict(norm_position="post", final_norm=False),
    "rms": dict(norm="rms"),
    "rotary positions": dict(rope=ROPE),
    "norms of queries and keys": dict(qk_norm=True, rope=ROPE, norm="rms"),
    "heads wider than their part": dict(head_dim=20, n_kv_head=2),
    "grouped heads": dict(n_kv_head=2),
    "one head of keys for 16": dict(n_head=16, n_kv_head=1, head_dim=3),
    "gated": dict(gated=True, activation="silu", n_inner=50),
    "no biases": dict(mlp_bias=False, out_bias=False, qkv_bias=False),
    "no segments": dict(segments=False),
    "gelu": dict(activation="gelu"),
    "relu": dict(activation="relu"),
    "narrow": dict(n_embd=12, head_dim=3, n_inner=17),  # nothing is a multiple of a vector
    # Of rows so wide a thread multiplies several chunks, and begins one at any block of weights.
    "gated and wide": dict(
        **dict(gated=True, activation="silu", n_inner=200),
        **dict(n_embd=2048, n_head=2, n_kv_head=1, head_dim=12),
    ),
    "wide heads": dict(n_head=1, n_kv_head=1, head_dim=80, n_embd=80),
}
DTYPES = [torch.float32, torch.bfloat16, torch.int8]


def make(change="gpt2", dtype=torch.float32):
    torch.manual_seed(0)
    config = TransformerConfig.from_transformers(GPT2)
    config = dataclasses.replace(config, **CHANGES[change])
    model = DoubleHeadsModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return config, pack_decoder(model, dtype)[0]


class Steps:
    """A cache, and steps on it by one implementation or the other."""

    def __init__(self, config, decoder, dtype=torch.float32, num_slots=3):
        self.config, self.decoder = config, decoder
        kept = torch.float32 if dtype == torch.float32 else torch.bfloat16
        self.keys, self.values = ops.make_cache(
            *(config.n_layer, num_slots, config.n_kv_head),
            capacity=96,
            head_dim=config.head_dim,
            dtype=kept,
        )
        self.keys.fill_(torch.nan)  # that of nobody is looked at
        self.values.fill_(torch.nan)

    def arguments(self, sequences):
        """For `sequences`, {slot: (tokens before, new token ids)}."""
        counts = [len(ids) for _, ids in sequences.values()]
        ids = torch.tensor([id for _, ids in sequences.values() for id in ids])
        return (
            ids,
            ids.flip(0) if self.config.segments else None,
            torch.tensor(list(sequences)),
            torch.tensor([0, *counts]).cumsum(0),
            torch.tensor([length for length, _ in sequences.values()]),
            self.keys,
            self.values,
        )

    def take(self, sequences):
        return ops.decoder_step(self.decoder, *self.arguments(sequences))

    def all_arguments(self, sequences):
        d = self.decoder
        sizes = (d.num_heads, d.head_dim, d.n_inner)
        settings = (d.pre_norm, d.rms_norm, d.norm_eps, d.activation, d.rope_scale)
        return (*self.arguments(sequences), d.tensors, *sizes, *settings)

    def take_by_reference(self, sequences):
        return reference.decoder_step(*self.all_arguments(sequences))


STEPS = [
    {2: (0, range(31)), 0: (0, range(50, 70))},
    {0: (20, [7]), 1: (0, [3, 9, 8]), 2: (31, range(40, 52))},
    {0: (21, [1]), 1: (3, [2]), 2: (43, [3])},
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_computes_what_the_reference_does(change, dtype):
    config, decoder = make(change, dtype)
    ours, theirs = Steps(config, decoder, dtype), Steps(config, decoder, dtype)
    for sequences in STEPS:
        hidden, expected = ours.take(sequences), theirs.take_by_reference(sequences)
        assert hidden.shape == (len(sequences), config.n_embd)
        # A sum that is rounded the other way can move a step of int8 or bfloat16.
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.int8: 3e-2}[dtype]
        assert (hidden - expected).norm() < tolerance * expected.norm()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", ["gpt2", "norms after the sums", "gated"])
def test_a_sequence_is_the_same_bits_alone_among_others_and_in_parts(change, dtype):
    config, decoder = make(change, dtype)
    together, alone = Steps(config, decoder, dtype), Steps(config, decoder, dtype)
    for sequences in STEPS:
        hidden = together.take(sequences)
        for i, (slot, part) in enumerate(sequences.items()):
            # Their segments are those of another order.
            ids, _, slots, _, lengths, keys, values = alone.arguments({slot: part})
            segments = together.arguments(sequences)[1]
            bounds = together.arguments(sequences)[3].tolist()
            mine = segments[bounds[i] : bounds[i + 1]]
            half = len(ids) // 2
            for begin, end in ((0, half), (half, len(ids))):
                if begin == end:
                    continue
                own = ops.decoder_step(
                    decoder,
                    ids[begin:end],
                    mine[begin:end].contiguous(),
                    slots,
                    torch.tensor([0, end - begin]),
                    lengths + begin,
                    keys,
                    values,
                )
            assert torch.equal(own[0], hidden[i])


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "change", ["gpt2", "norms after the sums", "gated", "gated and wide", "grouped heads"]
)
def test_the_number_of_threads_changes_no_bit(change, dtype):
    """Nor who computes a row: each thread some of many rows, or all threads those of a few."""
    config, decoder = make(change, dtype)
    many = {slot: (0, range(slot, slot + 50 + slot)) for slot in range(12)}
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            steps = Steps(config, decoder, dtype, num_slots=12)
            of_many = steps.take(many)
            results.append(torch.cat([of_many, *map(steps.take, STEPS)]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    alone = Steps(config, decoder, dtype, num_slots=12)
    ids, segments, _, offsets, *_ = alone.arguments(many)
    for slot, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        mine, of_mine = ids[begin:end], segments[begin:end].contiguous()
        slots, offset, length = torch.tensor([slot]), torch.tensor([0, end - begin]), torch.zeros(1)
        cache = (alone.keys, alone.values)
        own = ops.decoder_step(decoder, mine, of_mine, slots, offset, length.long(), *cache)
        assert torch.equal(own[0], results[0][slot])


@pytest.mark.parametrize("step", [torch.ops.convai_fast.decoder_step, reference.decoder_step])
def test_a_sequence_without_a_new_token_is_refused(step):
    steps = Steps(*make())
    arguments = [*steps.all_arguments({0: (0, [1, 2]), 2: (3, [4])})]
    arguments[3] = torch.tensor([0, 3, 3])
    with pytest.raises(IndexError, match=r"^decoder_step: a sequence has no new token"):
        step(*arguments)


@needs_kernels
def test_what_does_not_fit_is_named_and_nothing_is_written():
    config, decoder = make()
    steps = Steps(config, decoder)
    good = steps.all_arguments({0: (0, [1, 2]), 2: (3, [4])})
    names = (
        *("input_ids", "token_type_ids", "slots", "offsets", "lengths", "keys", "values"),
        *("weights", "num_heads", "head_dim", "n_inner", "pre_norm", "rms_norm", "norm_eps"),
        *("activation", "rope_scale"),
    )

    def call(**wrong):
        return torch.ops.convai_fast.decoder_step(
            *(dict(zip(names, good, strict=True)) | wrong).values()
        )

    call()
    steps.keys.fill_(5)
    ids, weights = good[0], good[7]
    for wrong, error, message in [
        ({"input_ids": ids + 99}, IndexError, "input_ids holds 101, but there are 101 tokens"),
        ({"input_ids": -ids}, IndexError, "input_ids holds -1"),
        ({"token_type_ids": ids + 98}, IndexError, "token_type_ids holds 102"),
        ({"token_type_ids": ids[:2]}, ValueError, "token_type_ids must have 3 values, not 2"),
        ({"input_ids": ids.int()}, TypeError, "input_ids must be Long"),
        ({"lengths": torch.tensor([0, 128])}, IndexError, "sequence 1 has 1 tokens after 128"),
        ({"slots": torch.tensor([0, 3])}, IndexError, "sequence 1 has slot 3, but there are 3"),
        ({"weights": weights[:-1]}, ValueError, "there must be 31 weights, not 30"),
        ({"weights": [*weights, None]}, ValueError, "there must be 31 weights, not 32"),
        (
            {"weights": [*weights[:11], weights[11][:1], *weights[12:]]},
            ValueError,
            r"weight of shape \[1, .* which need \[2, ",
        ),
        (
            {"weights": [*weights[:11], None, *weights[12:]]},
            ValueError,
            "a linear layer is missing",
        ),
        (
            {"weights": [*weights[:15], None, *weights[16:]]},
            ValueError,
            "a linear layer is missing",
        ),
        (
            {"weights": [*weights[:5], None, *weights[6:]]},
            ValueError,
            "weight of a norm is missing",
        ),
        ({"weights": [weights[0][:, :40].contiguous(), *weights[1:]]}, ValueError, "40"),
        ({"num_heads": 5}, ValueError, "5 heads of 12 do not fit keys"),
        ({"num_heads": 0}, ValueError, "0 heads"),
        ({"head_dim": 16}, ValueError, "keys"),
        ({"n_inner": 60}, ValueError, "does not fit"),
        ({"activation": "tanh"}, ValueError, "must be gelu_new, gelu, relu or silu, not tanh"),
        (
            {"weights": [*weights[:2], torch.ones(5), *weights[3:]]},
            ValueError,
            r"rope_frequencies .* \[5\]",
        ),
        (
            {"weights": [*weights[:9], torch.ones(2, 12), *weights[10:]]},
            ValueError,
            "queries and keys must both have a norm",
        ),
        ({"keys": steps.keys[:1]}, ValueError, "keys .* and values"),
        ({"keys": steps.keys.bfloat16()}, TypeError, "values must be BFloat16, as keys are"),
    ]:
        with pytest.raises(error, match=message):
            call(**wrong)
    assert (steps.keys == 5).all()
    few = dataclasses.replace(decoder, position_embedding=decoder.position_embedding[:40])
    with pytest.raises(IndexError, match="a sequence has 41 tokens, but there are 40 positions"):
        Steps(config, few).take({0: (0, range(41))})


def test_opcheck_passes():
    config, decoder = make()
    steps = Steps(config, decoder)
    steps.keys.zero_(), steps.values.zero_()
    torch.library.opcheck(
        torch.ops.convai_fast.decoder_step.default,
        steps.all_arguments({0: (0, [1, 2]), 2: (3, [4])}),
    )
