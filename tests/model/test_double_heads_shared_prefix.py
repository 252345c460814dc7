"""The shared-prefix layout computes what the padded layout and transformers compute."""

import random

import pytest
import torch

from convai_fast.data.batches import DialogueBatches
from convai_fast.data.build_store import build_store
from convai_fast.data.readers import load_dialogues
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from convai_fast.dialogue.tokenizer import load_tokenizer
from tests.helpers.model_peers import assert_gradients, make_peer, relative_error


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory):
    """Random dialogues with 1 to 20 candidates, of very different lengths."""
    rng = random.Random(0)

    def texts(least, most, words=9):
        return [
            " ".join(rng.choices(["yes", "no", "tea", "why", "go", "é"], k=rng.randint(1, words)))
            for _ in range(rng.randint(least, most))
        ]

    dialogues = [
        Dialogue(texts(0, 4), [Utterance(texts(0, 6), texts(1, 20)), Utterance([], texts(1, 1))])
        for _ in range(20)
    ]
    return build_store({"train": dialogues}, tokenizer, tmp_path_factory.mktemp("s") / "store")


def make_batches(store, layout, **options):
    defaults = {"batch_size": 5, "num_candidates": 0, "max_history": 2, "max_length": 256}
    return DialogueBatches(store, "train", layout=layout, **{**defaults, **options})


def backward_of_each_example(peer, batches, rows):
    """transformers on one example at a time, which needs no padding to a common count."""
    batch = [batches.collate(rows[i : i + 1]) for i in range(len(rows))]
    num_labels = sum(int((example["labels"] != -100).sum()) for example in batch)
    outputs = [peer(**example) for example in batch]
    loss = sum(
        output.loss * (example["labels"] != -100).sum() / num_labels
        for output, example in zip(outputs, batch, strict=True)
    )
    mc_loss = sum(output.mc_loss for output in outputs) / len(rows)
    (loss + 0.5 * mc_loss).backward()
    return loss, mc_loss, [output.mc_logits[0] for output in outputs]


def assert_parity(peer, model, shared, padded, rows):
    expected_loss, expected_mc_loss, expected_mc_logits = backward_of_each_example(
        peer, padded, rows
    )
    in_padded = model(**padded.collate(rows))
    actual = model(**shared.collate(rows))
    (actual.loss + 0.5 * actual.mc_loss).backward()

    assert relative_error(actual.loss, expected_loss) < 1e-5
    assert relative_error(actual.loss, in_padded.loss) < 1e-5
    assert (actual.mc_loss - expected_mc_loss).abs() < 1e-5
    assert (actual.mc_loss - in_padded.mc_loss).abs() < 1e-5
    for logits, expected in zip(actual.mc_logits, expected_mc_logits, strict=True):
        assert relative_error(logits[: len(expected)], expected) < 1e-4
        assert torch.isneginf(logits[len(expected) :]).all()
    assert_gradients(model, peer)


@pytest.mark.parametrize("num_candidates", [1, 2, 4, 20])
def test_losses_and_every_gradient_are_those_of_transformers_and_of_the_padded_layout(
    architecture, num_candidates, store, tokenizer, to_ours
):
    peer = make_peer(architecture, vocab_size=len(tokenizer), n_positions=256)
    shared = make_batches(store, "shared", num_candidates=num_candidates)
    padded = make_batches(store, "padded", num_candidates=num_candidates)
    assert_parity(peer, to_ours(peer), shared, padded, shared.rows[:7])


def test_real_dialogues_of_the_full_vocabulary_agree(architecture, to_ours, shared_dir, tmp_path):
    tokenizer = load_tokenizer(shared_dir / "tokenizers" / architecture)
    dialogues = load_dialogues(shared_dir / "data" / "synthetic-persona-chat" / "valid.csv")
    store = build_store({"train": dialogues["train"][:6]}, tokenizer, tmp_path / "store")
    # Weights as a new model's: real sequences are longer than the random ones above.
    peer = make_peer(
        architecture, noise=0.0, vocab_size=len(tokenizer), n_positions=512, n_embd=192, n_head=3
    )
    shared, padded = (
        make_batches(store, layout, num_candidates=4, max_length=512)
        for layout in ("shared", "padded")
    )
    assert_parity(peer, to_ours(peer), shared, padded, shared.rows[-2:])


def test_language_model_logits_of_every_position_are_those_of_the_padded_layout(
    architecture, store, tokenizer, to_ours
):
    model = to_ours(make_peer(architecture, vocab_size=len(tokenizer), n_positions=256))
    rows = make_batches(store, "shared").rows[:1]
    in_shared, in_padded = (
        make_batches(store, layout).collate(rows) for layout in ("shared", "padded")
    )
    with torch.no_grad():
        actual = model(**in_shared, return_logits=True).logits
        expected = model(**in_padded, return_logits=True).logits
    for candidate, last in enumerate(in_padded["mc_token_ids"][0].tolist()):
        branch = in_shared["branch_ids"]
        own = actual[(branch == 0) | (branch == candidate + 1)]
        assert relative_error(own, expected[0, candidate, : last + 1]) < 1e-4


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_gradient_checkpointing_changes_no_gradient_not_even_with_dropout(
    architecture, layout, store, tokenizer, to_ours
):
    model = to_ours(make_peer(architecture, vocab_size=len(tokenizer), n_positions=256)).train()
    batches = make_batches(store, layout, num_candidates=3)
    gradients = []
    for checkpointing in (False, True):
        model.transformer.gradient_checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(0)
        output = model(**batches[1])
        (output.loss + output.mc_loss).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_batch_says_where_its_labels_are(store):
    for num_candidates in (1, 3):
        for batch in make_batches(store, "shared", num_candidates=num_candidates):
            assert torch.equal(batch["label_positions"], (batch["labels"] != -100).nonzero()[:, 0])


def test_a_compiled_bf16_step_has_the_gradients_of_the_plain_one_dropout_included(
    store, tokenizer, to_ours
):
    model = to_ours(make_peer("gpt2", vocab_size=len(tokenizer), n_positions=256)).train()
    batches = make_batches(store, "shared", num_candidates=3)
    batch, gradients = batches.collate(batches.rows[:6]), []
    for forward in (model, torch.compile(model, backend="aot_eager", dynamic=True)):
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            output = forward(**batch)
        (output.loss + output.mc_loss).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    plain, compiled = gradients
    for name, gradient in plain.items():
        if name != "multiple_choice_head.bias":  # which is rounding noise
            assert relative_error(compiled[name], gradient) < 1e-4, name


def test_an_empty_batch_has_losses_of_zero_and_gradients(architecture, store, tokenizer, to_ours):
    model = to_ours(make_peer(architecture, vocab_size=len(tokenizer), n_positions=256))
    output = model(**make_batches(store, "shared").collate(torch.zeros(0, dtype=int).numpy()))
    (output.loss + output.mc_loss).backward()
    assert output.loss == output.mc_loss == 0
    assert all(parameter.grad.norm() == 0 for parameter in model.parameters())


@pytest.mark.parametrize("name", ["offsets", "position_ids", "mc_token_ids"])
def test_what_the_layout_needs_is_named(architecture, store, tokenizer, to_ours, name):
    model = to_ours(make_peer(architecture, vocab_size=len(tokenizer), n_positions=256))
    batch = dict(make_batches(store, "shared")[0])
    del batch[name]
    with pytest.raises(ValueError, match="need offsets, position_ids and mc_token_ids"):
        model(**batch)
