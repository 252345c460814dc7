import pytest
import torch
import transformers

from convai_fast import ops
from convai_fast.data.tokenizer import SpecialIds
from convai_fast.errors import UserError
from convai_fast.generation.engine import GenerationEngine, fit_prefix
from convai_fast.generation.params import SamplingParams
from convai_fast.model import DoubleHeadsModel
from convai_fast.ops.reference import build_sequence

SPECIAL = SpecialIds(bos=3, eos=7, speaker1=59, speaker2=11, pad=50)
N_POSITIONS = 48
SHAPE = dict(vocab_size=60, n_positions=N_POSITIONS, n_embd=32, n_layer=2, n_head=4)
GREEDY = SamplingParams(no_sample=True, max_length=12)


def tokens(count, seed):
    """Ordinary token ids, none of them special."""
    ordinary = torch.tensor([i for i in range(60) if i not in SPECIAL])
    generator = torch.Generator().manual_seed(seed)
    return ordinary[torch.randint(len(ordinary), (count,), generator=generator)].tolist()


def prompt(seed, turns=3):
    persona = [tokens(4, 10 * seed), tokens(3, 10 * seed + 1)]
    return persona, [tokens(2 + i, 10 * seed + 2 + i) for i in range(turns)]


def transformers_model(architecture):
    torch.manual_seed(0)
    if architecture == "gpt2":
        model = transformers.GPT2DoubleHeadsModel(
            transformers.GPT2Config(**SHAPE, bos_token_id=SPECIAL.bos, eos_token_id=SPECIAL.eos)
        )
    else:
        model = transformers.OpenAIGPTDoubleHeadsModel(transformers.OpenAIGPTConfig(**SHAPE))
    # Fresh weights are so small that every reply is one token over and over, whatever the prompt.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 1.0 if "wpe" in name or "positions_embed" in name else 0.2
            parameter.add_(torch.randn_like(parameter), alpha=std)
    return model.eval()


@pytest.fixture(scope="module", params=["openai-gpt", "gpt2"])
def models(request, tmp_path_factory):
    """The same random weights as transformers' class and as ours."""
    theirs = transformers_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, DoubleHeadsModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    transformers_model("gpt2").save_pretrained(folder)
    return DoubleHeadsModel.from_pretrained(folder)


@pytest.fixture
def engine(model):
    return GenerationEngine(model, SPECIAL)


def recomputed_reply(theirs, persona, history, params):
    """The greedy reply, the whole sequence computed anew for every token, as of old."""
    reply = []
    while len(reply) < params.max_length:
        input_ids, token_type_ids, _ = build_sequence(persona, history, reply, SPECIAL, False)
        with torch.no_grad():
            logits = theirs(
                input_ids=torch.tensor([[input_ids]]),
                token_type_ids=torch.tensor([[token_type_ids]]),
                mc_token_ids=torch.tensor([[len(input_ids) - 1]]),
            ).logits[0, 0, -1]
        if len(reply) < params.min_length:
            logits[list(SPECIAL)] = -torch.inf
        token = int(logits.argmax())
        if token in SPECIAL:
            break
        reply.append(token)
    return reply


@pytest.mark.parametrize("min_length", [0, 12])
def test_greedy_replies_are_those_of_transformers_recomputed_for_every_token(models, min_length):
    theirs, ours = models
    engine = GenerationEngine(ours, SPECIAL)
    params = SamplingParams(no_sample=True, max_length=12, min_length=min_length)
    replies = []
    for seed in range(6):
        persona, history = prompt(seed, turns=seed % 4)
        replies.append(engine.reply(persona, history, params))
        assert replies[-1] == recomputed_reply(theirs, persona, history, params)
    assert len({tuple(reply) for reply in replies}) >= 4  # or the comparison says little


def test_temperature_0_is_greedy(engine):
    zero = SamplingParams(temperature=0, max_length=12)
    assert engine.reply(*prompt(1), zero) == engine.reply(*prompt(1), GREEDY)


def test_special_tokens_end_a_reply_but_not_before_min_length(engine):
    def lengths(min_length):
        replies = [
            engine.reply(
                *prompt(0),
                SamplingParams(
                    max_length=8, min_length=min_length, temperature=20, top_p=0, seed=seed
                ),
            )
            for seed in range(40)
        ]
        assert not {token for reply in replies for token in reply} & set(SPECIAL)
        return {len(reply) for reply in replies}

    assert min(lengths(0)) == 0
    assert min(lengths(3)) == 3
    assert lengths(8) == {8}


def test_a_reply_depends_on_its_seed(engine):
    def reply(seed):
        params = SamplingParams(max_length=12, min_length=12, temperature=5, top_p=0, seed=seed)
        return engine.reply(*prompt(2), params)

    assert reply(1) == reply(1)
    assert len({tuple(reply(seed)) for seed in range(5)}) == 5


def test_each_token_is_drawn_with_the_seed_as_key_and_its_place_as_counter(engine):
    indifferent = DoubleHeadsModel(engine.model.config)
    for parameter in indifferent.parameters():
        torch.nn.init.zeros_(parameter)
    params = SamplingParams(max_length=10, min_length=10, temperature=1, top_p=0, seed=9)
    reply = GenerationEngine(indifferent, SPECIAL).reply(*prompt(0), params)

    logits = torch.zeros(10, 60)
    logits[:, list(SPECIAL)] = -torch.inf
    expected, _ = ops.sample(logits, seeds=9, steps=torch.arange(10))
    assert reply == expected.tolist()
    assert len(set(reply)) > 5


def test_the_prompt_and_each_token_are_computed_once_and_only_when_asked_for(engine):
    computed = []
    hook = engine.model.transformer.register_forward_pre_hook(
        lambda module, args: computed.append(args[0].shape[1])
    )
    persona, history = prompt(3)
    stream = engine.stream(persona, history, SamplingParams(max_length=3, min_length=3))
    assert computed == []
    next(stream)
    prompt_length = len(build_sequence(persona, history, [], SPECIAL, False)[0])
    assert computed == [prompt_length]
    next(stream)
    assert computed == [prompt_length, 1]
    list(stream)
    assert computed == [prompt_length, 1, 1]
    hook.remove()


def test_inference_mode_does_not_leak_to_whoever_reads_the_stream(engine):
    for _ in engine.stream(*prompt(3), GREEDY):
        assert not torch.is_inference_mode_enabled()


def test_a_model_in_training_mode_replies_without_dropout(engine):
    expected = engine.reply(*prompt(4), GREEDY)
    engine.model.train()
    assert engine.reply(*prompt(4), GREEDY) == expected


def test_a_bfloat16_model_replies(engine):
    half = GenerationEngine(
        DoubleHeadsModel(engine.model.config).to(torch.bfloat16), engine.special_ids
    )
    assert len(half.reply(*prompt(4), SamplingParams(max_length=5, min_length=5))) == 5


@pytest.mark.parametrize("max_length", [1, 20, N_POSITIONS - 4])
def test_a_prompt_longer_than_the_model_is_cut_to_leave_room_for_the_reply(engine, max_length):
    persona, history = [tokens(9, i) for i in range(9)], [tokens(9, 100 + i) for i in range(9)]
    params = SamplingParams(no_sample=True, max_length=max_length, min_length=max_length)
    reply = engine.reply(persona, history, params)
    assert len(reply) == max_length
    kept = fit_prefix(persona, history, N_POSITIONS - max_length - 1)
    assert reply == engine.reply(*kept, params)


def test_a_max_length_without_room_for_a_prompt_is_refused_at_once(engine):
    with pytest.raises(UserError, match=r"max_length is 45.*48 positions: give at most 44"):
        engine.stream([], [], SamplingParams(max_length=45))


@pytest.mark.parametrize(
    ("room", "kept_persona", "kept_history"),
    [
        (13, [[1, 2], [3]], [[4, 5], [6], [7, 8, 9]]),  # fits exactly
        (12, [[1, 2], [3]], [[6], [7, 8, 9]]),  # the oldest turn goes first
        (9, [[1, 2], [3]], [[7, 8, 9]]),
        (7, [[1, 2]], [[7, 8, 9]]),  # then persona sentences, from the end
        (6, [], [[7, 8, 9]]),
        (4, [], [[8, 9]]),  # then the beginning of the last turn
        (3, [], [[9]]),
        (2, [], []),
        (1, [], []),
    ],
)
def test_what_does_not_fit_is_cut_oldest_turns_first(room, kept_persona, kept_history):
    persona, history = [[1, 2], [3]], [[4, 5], [6], [7, 8, 9]]
    assert fit_prefix(persona, history, room) == (kept_persona, kept_history)
    assert (len(persona), len(history)) == (2, 3)  # the caller's lists are left alone


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_length", 0),
        ("min_length", -1),
        ("min_length", 21),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_a_sampling_parameter_out_of_range_is_named(field, value):
    with pytest.raises(UserError, match=f"^{field} is {value}, but must be "):
        SamplingParams(**{field: value})
