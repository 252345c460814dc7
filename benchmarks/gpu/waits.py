"""What waits for the GPU where nothing may: `torch.cuda.set_sync_debug_mode`."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.gpu import ranking, sampling, training, workload
from benchmarks.gpu.collating import Store
from benchmarks.gpu.notes import Notes, Setting
from convai_fast import ops
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Request
from convai_fast.training.compute import Compute
from convai_fast.training.distributed import Ranks

PROMPT_TOKENS, NEW_TOKENS = 32, 64


def run(notes: Notes, setting: Setting) -> None:
    """Operators, a training step and a ranking may not wait; the waits of decoding are counted."""
    if not setting.is_gpu:
        notes.not_run("waits", "nothing waits for a CPU; the calls are made all the same")
    for name, call in calls(setting).items():
        with notes.attempt(name):
            call()  # what is made at a first call may wait
            with mode("error", setting):
                call()
            if setting.is_gpu:
                notes.figure(name, waits=0)
    with notes.attempt("decoding"):
        waits = count_of_decoding(setting)
        if setting.is_gpu:
            notes.figure("decoding", waits_a_token=waits)


@contextmanager
def mode(name: str, setting: Setting) -> Iterator[None]:
    """Within, a wait for the GPU raises ("error") or warns ("warn")."""
    setting.wait()
    if setting.is_gpu:
        torch.cuda.set_sync_debug_mode(name)
    try:
        yield
    finally:
        if setting.is_gpu:
            torch.cuda.set_sync_debug_mode("default")


def calls(setting: Setting) -> dict[str, Callable[[], object]]:
    """What may not wait."""
    device = setting.device
    logits = torch.randn(8, 1019, device=device)
    draw = sampling.make_ours(8, 50, 0.9, device)
    made_up = Store(num_utterances=100, examples=4, num_candidates=3)
    tables = made_up.tables(device)
    store = workload.store(setting)
    _, options = training.sizes_of_steps(store, setting)
    model = workload.model("openai-gpt", setting)
    steps = training.steps_of(store, "shared", options, setting)
    batch = steps[0][0][0]
    compute = Compute(options, Ranks())
    return {
        "sample": lambda: draw(logits),
        "collate": lambda: ops.collate(*tables, *made_up.padded),
        "collate_shared": lambda: ops.collate_shared(*tables, *made_up.shared),
        "ranking": lambda: ranking.rank(model.eval(), batch, compute),
        "training step": training.Ours(model, steps[:1], options),
    }


def count_of_decoding(setting: Setting) -> float:
    """How often writing a reply waits for each of its tokens."""
    model = workload.model("gpt2", setting)
    tokenizer = workload.tokenizer(setting.smoke, model.config.vocab_size)
    engine = GenerationEngine(model, tokenizer, weights="bfloat16")
    params = SamplingParams(max_length=NEW_TOKENS, min_length=NEW_TOKENS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # what is made at a first call may wait
        ids = torch.randint(1000, (8, PROMPT_TOKENS), generator=generator).tolist()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with mode("warn", setting):
                engine.generate(Request(input_ids=row, params=params) for row in ids)
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    return round(len(waits) / NEW_TOKENS, 3)
