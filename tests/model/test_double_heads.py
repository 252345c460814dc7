import pytest
import torch

from convai_fast.data.batches import DialogueBatches
from convai_fast.data.build_store import build_store
from convai_fast.data.readers import load_dialogues
from convai_fast.dialogue.tokenizer import load_tokenizer
from convai_fast.model import DoubleHeadsModel, TransformerConfig
from tests.helpers.model_peers import assert_gradients, make_batch, make_peer, relative_error

CONFIGS = [
    pytest.param(dict(layer_norm_epsilon=1e-3), id="small"),
    pytest.param(dict(n_embd=768, n_head=12, vocab_size=500), id="width-768"),
    pytest.param(dict(vocab_size=40483), id="vocabulary-of-gpt"),
    pytest.param(dict(vocab_size=50262), id="vocabulary-of-gpt2"),
]


@pytest.mark.parametrize("settings", CONFIGS)
def test_losses_logits_and_every_gradient_are_those_of_transformers(
    architecture, settings, to_ours
):
    peer = make_peer(architecture, **settings)
    model = to_ours(peer)
    assert_parity(peer, model, make_batch(model.config.vocab_size).inputs)


def test_real_padded_batches_of_the_full_vocabulary_agree(
    architecture, to_ours, shared_dir, tmp_path
):
    tokenizer = load_tokenizer(shared_dir / "tokenizers" / architecture)
    dialogues = load_dialogues(shared_dir / "data" / "synthetic-persona-chat" / "valid.csv")
    store = build_store({"train": dialogues["train"][:6]}, tokenizer, tmp_path / "store")
    batches = DialogueBatches(
        store,
        "train",
        batch_size=2,
        num_candidates=3,
        max_history=2,
        max_length=512,
        layout="padded",
    )
    # Weights as a new model's: real sequences are longer than the random ones above.
    peer = make_peer(
        architecture, noise=0.0, vocab_size=len(tokenizer), n_positions=512, n_embd=192, n_head=3
    )
    assert_parity(peer, to_ours(peer), batches.collate(batches.rows[-2:]))


def assert_parity(peer, model, inputs):
    """Losses, logits of both heads and the gradient of every parameter are those of `peer`."""
    expected = peer(**inputs)
    actual = model(**inputs)
    (expected.loss + 0.5 * expected.mc_loss).backward()
    (actual.loss + 0.5 * actual.mc_loss).backward()

    assert actual.logits is None
    assert relative_error(actual.loss, expected.loss) < 1e-5
    assert relative_error(actual.mc_loss, expected.mc_loss) < 1e-5
    assert relative_error(actual.mc_logits, expected.mc_logits) < 1e-4
    assert_gradients(model, peer)

    inputs = dict(inputs, labels=None, mc_labels=None)
    with torch.no_grad():
        assert relative_error(model(**inputs).logits, expected.logits) < 1e-4


def test_right_padding_needs_no_mask(architecture, to_ours):
    peer = make_peer(architecture)
    model = to_ours(peer)
    batch = make_batch(model.config.vocab_size)
    expected = peer(**batch.inputs, attention_mask=batch.is_real.flatten(0, 1).long())
    actual = model(**batch.inputs, return_logits=True)
    assert relative_error(actual.logits[batch.is_real], expected.logits[batch.is_real]) < 1e-5
    assert relative_error(actual.mc_logits, expected.mc_logits) < 1e-5
    assert relative_error(actual.loss, expected.loss) < 1e-5


def test_gpt2_with_another_width_of_the_mlp(to_ours):
    peer = make_peer("gpt2", n_inner=40)
    input_ids = torch.arange(20).view(1, 20)
    assert relative_error(to_ours(peer)(input_ids).logits, peer(input_ids).logits) < 1e-5


@pytest.mark.parametrize("activation", ["relu", "silu", "swish", "gelu"])
def test_an_activation_name_means_what_it_means_in_transformers(architecture, activation, to_ours):
    field = {"openai-gpt": "afn", "gpt2": "activation_function"}[architecture]
    peer = make_peer(architecture, **{field: activation})
    with torch.no_grad():  # to where the two kinds of gelu differ
        for block in peer.transformer.h:
            block.mlp.c_fc.weight.mul_(20)
    input_ids = torch.arange(20).view(1, 20)
    error = relative_error(to_ours(peer)(input_ids).logits, peer(input_ids).logits)
    assert error < 1e-5


def test_two_dimensional_input_without_optional_arguments(architecture, to_ours):
    peer = make_peer(architecture)
    input_ids = torch.randint(0, 101, (5, 17))
    expected, actual = peer(input_ids), to_ours(peer)(input_ids)
    assert actual.logits.shape == (5, 17, 101)
    assert actual.mc_logits.shape == (5,)
    assert relative_error(actual.logits, expected.logits) < 1e-5
    # transformers reads the last position when not told which.
    assert relative_error(actual.mc_logits, expected.mc_logits.view(5)) < 1e-5
    assert actual.loss is None
    assert actual.mc_loss is None


def test_two_dimensional_input_with_labels(architecture, to_ours):
    peer = make_peer(architecture)
    input_ids = torch.randint(0, 101, (5, 17))
    inputs = dict(
        input_ids=input_ids,
        labels=input_ids,
        mc_token_ids=torch.arange(5),
        mc_labels=torch.ones(1).long(),
    )
    expected, actual = peer(**inputs), to_ours(peer)(**inputs)
    assert relative_error(actual.loss, expected.loss) < 1e-5
    assert relative_error(actual.mc_loss, expected.mc_loss) < 1e-5


def test_bfloat16_autocast_is_no_less_exact_than_transformers(architecture, to_ours):
    peer = make_peer(architecture, n_embd=128, n_layer=3)
    model = to_ours(peer)
    batch = make_batch(model.config.vocab_size, num_candidates=6)

    def compute(net, **options):
        net.zero_grad()
        output = net(**batch.inputs, **options)
        (output.loss + output.mc_loss).backward()
        gradients = [parameter.grad.flatten() for parameter in net.parameters()]
        return output, torch.cat(gradients)

    exact, _ = compute(peer)
    peer_exact_gradient = compute(peer)[1]
    exact_gradient = compute(model)[1]
    with torch.autocast("cpu", torch.bfloat16):
        theirs, their_gradient = compute(peer)
        ours, our_gradient = compute(model, return_logits=True)

    assert ours.loss.dtype == ours.mc_loss.dtype == torch.float32
    for name in ("logits", "mc_logits"):
        ours_off = relative_error(getattr(ours, name), getattr(exact, name))
        assert ours_off <= 2 * relative_error(getattr(theirs, name), getattr(exact, name)), name
    assert relative_error(our_gradient, exact_gradient) <= 2 * relative_error(
        their_gradient, peer_exact_gradient
    )
    # A single number may be exact by chance: bound it by bfloat16's precision instead.
    assert relative_error(ours.loss, exact.loss) < 2**-8
    assert relative_error(ours.mc_loss, exact.mc_loss) < 2**-8


def test_under_bfloat16_the_ranking_head_and_the_losses_are_float32(architecture):
    torch.manual_seed(0)
    config = {"model_type": architecture, "n_embd": 64, "n_layer": 1, "n_head": 2}
    config |= {"n_positions": 64, "vocab_size": 300}
    model = DoubleHeadsModel(TransformerConfig.from_transformers(config)).eval()
    with torch.no_grad():
        model.transformer.token_embedding.weight.mul_(20)  # losses that bfloat16 would round
    inputs = make_batch(300).inputs
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs, return_logits=True)
    assert output.mc_logits.dtype == output.loss.dtype == output.mc_loss.dtype == torch.float32
    logits, labels = output.logits[..., :-1, :].double(), inputs["labels"][..., 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    # In bfloat16 a few hundred values are all there are around any number.
    chosen = model.multiple_choice_head.weight.new_empty(4096, 64).normal_()
    assert len(model.multiple_choice_head(chosen).unique()) > 4000
    expected = torch.nn.functional.cross_entropy(output.mc_logits.double(), inputs["mc_labels"])
    assert output.mc_loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.fixture
def model(architecture):
    torch.manual_seed(0)
    sizes = dict(vocab_size=101, n_positions=48, n_embd=32, n_layer=2, n_head=4)
    config = TransformerConfig.from_transformers({"model_type": architecture, **sizes})
    return DoubleHeadsModel(config).eval()


def test_logits_are_computed_when_asked_for_or_without_labels(model):
    inputs = make_batch(101).inputs
    assert model(**inputs).logits is None
    assert model(**inputs, return_logits=True).logits.shape == (3, 4, 29, 101)
    assert model(**inputs, return_logits=False).logits is None
    inputs.pop("labels")
    assert model(**inputs).logits.shape == (3, 4, 29, 101)
    assert model(**inputs, return_logits=False).logits is None


def test_the_vocabulary_is_scored_at_labelled_positions_only(model, monkeypatch):
    inputs = make_batch(101).inputs
    scored = []
    lm_logits = model.lm_logits
    monkeypatch.setattr(
        model, "lm_logits", lambda hidden: scored.append(hidden) or lm_logits(hidden)
    )
    model(**inputs)
    assert [hidden.shape for hidden in scored] == [((inputs["labels"] != -100).sum(), 32)]


def test_the_label_of_a_first_token_is_ignored_as_nothing_predicts_it(model):
    inputs = make_batch(101).inputs
    loss = model(**inputs).loss
    inputs["labels"][..., 0] = 7
    assert model(**inputs).loss == loss


def test_a_batch_without_any_label_has_loss_zero_and_zero_gradients(model):
    inputs = make_batch(101).inputs
    inputs["labels"][:] = -100
    inputs["mc_labels"][:] = -100
    output = model(**inputs)
    assert output.loss == 0
    assert output.mc_loss == 0
    (output.loss + output.mc_loss).backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_a_missing_candidate_gets_no_probability_and_changes_nothing_else(model):
    inputs = make_batch(101, num_candidates=4).inputs
    inputs["mc_labels"][:] = 1
    inputs["mc_token_ids"][:, 2] = -1
    output = model(**inputs)
    assert (output.mc_logits[:, 2] == -torch.inf).all()
    assert (output.mc_logits.softmax(-1)[:, 2] == 0).all()
    output.mc_loss.backward()
    gradient = model.transformer.blocks[0].mlp.up.weight.grad.clone()

    for name in ("input_ids", "token_type_ids", "labels"):
        inputs[name] = inputs[name][:, [0, 1, 3]]
    inputs["mc_token_ids"] = inputs["mc_token_ids"][:, [0, 1, 3]]
    model.zero_grad()
    without = model(**inputs)
    without.mc_loss.backward()
    torch.testing.assert_close(without.mc_logits, output.mc_logits[:, [0, 1, 3]])
    torch.testing.assert_close(without.mc_loss, output.mc_loss)
    torch.testing.assert_close(model.transformer.blocks[0].mlp.up.weight.grad, gradient)


def test_an_example_without_candidates_and_label_leaves_no_nan(model):
    inputs = make_batch(101).inputs
    inputs["mc_token_ids"][0] = -1
    inputs["mc_labels"][0] = -100
    output = model(**inputs)
    (output.loss + output.mc_loss).backward()
    assert output.mc_loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_multiple_choice_position_outside_the_sequence_is_an_error(model):
    inputs = make_batch(101).inputs
    inputs["mc_token_ids"][0, 0] = 29
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        model(**inputs)


def test_labels_of_another_shape_are_refused(model):
    inputs = make_batch(101).inputs
    inputs["labels"] = inputs["labels"][:, -1]
    with pytest.raises(ValueError, match=r"labels of shape \(3, 29\) do not fit .* \(3, 4, 29\)"):
        model(**inputs)


def test_dropout_before_the_multiple_choice_head_is_its_own(architecture):
    off = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, summary_first_dropout=0.5)
    sizes = dict(vocab_size=101, n_positions=48, n_embd=32, n_layer=2, n_head=4)
    config = TransformerConfig.from_transformers({"model_type": architecture, **sizes, **off})
    model = DoubleHeadsModel(config)
    inputs = make_batch(101).inputs
    first, second = model(**inputs), model(**inputs)
    assert torch.equal(first.loss, second.loss)
    assert not torch.equal(first.mc_logits, second.mc_logits)


def test_too_long_sequences_are_refused(model):
    with pytest.raises(ValueError, match="49 tokens, but the model has only 48 positions"):
        model(torch.zeros(2, 3, 49, dtype=torch.int64))


def test_resizing_keeps_old_rows_and_draws_new_ones(model):
    before = model.transformer.token_embedding.weight.detach().clone()
    assert model.resize_token_embeddings(1101) is None
    weight = model.transformer.token_embedding.weight
    assert torch.equal(weight[:101], before)
    assert weight[101:].std().item() == pytest.approx(0.02, rel=0.05)
    assert weight.requires_grad
    assert model.config.vocab_size == model.transformer.config.vocab_size == 1101
    assert model(torch.tensor([[1100]])).logits.shape == (1, 1, 1101)


def test_resizing_to_the_same_size_changes_nothing(model):
    before = model.transformer.token_embedding.weight
    model.resize_token_embeddings(101)
    assert model.transformer.token_embedding.weight is before


def test_resizing_to_less_drops_the_last_rows(model):
    before = model.transformer.token_embedding.weight.detach().clone()
    model.resize_token_embeddings(100)
    assert torch.equal(model.transformer.token_embedding.weight, before[:100])
    assert model(torch.tensor([[99]])).logits.shape == (1, 1, 100)


def test_training_step_runs_under_autocast_with_dropout(model):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs = make_batch(101).inputs
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**inputs)
        (output.loss + output.mc_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0]
