"""What is compared: replies, rankings and training steps of one model, here and in transformers."""

import inspect
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from convai_fast.bulk.dataset import DatasetRequests
from convai_fast.comparison import plain
from convai_fast.comparison.measure import Way, Workload
from convai_fast.data.batches import DialogueBatches, Layout, Share, spread, tensors_of
from convai_fast.data.build_store import build_store
from convai_fast.data.store import DialogueStore
from convai_fast.dialogue.dialogue import Dialogue
from convai_fast.dialogue.encoding import encode
from convai_fast.dialogue.prompt import Prompt
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Request, build_prompt
from convai_fast.loading import layout_for
from convai_fast.model import families
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.options import Precision
from convai_fast.training.compute import Compute
from convai_fast.training.distributed import Ranks
from convai_fast.training.interruption import Stop
from convai_fast.training.optimizer import make_optimizer
from convai_fast.training.options import TrainOptions
from convai_fast.training.step import TrainStep

NUM_PROMPTS, NEW_TOKENS, MAX_CANDIDATES = 32, 32, 20
_MAX_DIALOGUES = 200  # more would take long to tokenise, and change nothing


class Comparison:
    """One model on one device, as this library has it and as transformers has it.

    Args:
        model: on its device; `load` gives it and its tokenizer. Its weights stay as they are.
        dialogues: what it is asked about; the first of them.
        max_history: exchanges of history that it sees.
        weights: of replies, as `GenerationEngine` takes them; transformers has float32 for int8.
        precision: of training steps.
        seconds: for how long a workload will be measured, about.

    Raises UserError where the device cannot compute so.
    """

    def __init__(
        self,
        model: DoubleHeadsModel,
        tokenizer: PreTrainedTokenizerFast,
        dialogues: Sequence[Dialogue],
        *,
        max_history: int,
        weights: str = "float32",
        precision: Precision = "auto",
        seconds: float = 30.0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.layout = layout_for(tokenizer, model.config)
        self.device = model.transformer.token_embedding.weight.device
        self.dialogues = dialogues[:_MAX_DIALOGUES]
        self.max_history, self.weights, self.seconds = max_history, weights, seconds
        self.options = TrainOptions(
            gradient_accumulation_steps=1, precision=precision, lr=0.0, device=str(self.device)
        )
        self.compute = Compute(self.options, Ranks())
        new_tokens = min(NEW_TOKENS, model.config.n_positions // 4)
        self.params = SamplingParams(max_length=new_tokens, min_length=new_tokens)
        self.turns = list(DatasetRequests(self.dialogues, "valid", max_history, self.params))
        model.head_is_new = False  # how it ranks does not matter, only how fast

    def workloads(self) -> Iterator[Workload]:
        """One after another, so that what one needs is gone before the next is made."""
        transformers.utils.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, self.tokenizer)
            spread_out = [self.turns[i] for i in spread(len(self.turns), NUM_PROMPTS)]
            prompts = [self._prompt(turn.request, self.params.max_length) for turn in spread_out]
            dtype = torch.bfloat16 if self.weights == "bfloat16" else torch.float32
            writer: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            writer.generation_config = transformers.GenerationConfig()  # it draws as it is told
            writer.to(self.device).eval()
            engine = GenerationEngine(
                self.model, self.tokenizer, max_batch_size=len(prompts), weights=self.weights
            )
            yield self._replies(f"replies to {len(prompts)} prompts", engine, writer, prompts)
            yield self._replies("reply to one prompt", engine, writer, prompts[:1])
            del writer
            double_heads = families.of(self.model.config).peer_class()
            theirs: Any = double_heads.from_pretrained(folder)
            theirs.to(self.device).eval()
            yield self._ranking(engine, theirs)
            del engine
            dialogues, place = {"train": [*self.dialogues]}, Path(folder) / "store"
            store = build_store(dialogues, self.tokenizer, place, self.layout)
            yield self._training_step(store, theirs)

    def _prompt(self, request: Request, room_for: int) -> Prompt:
        config = self.model.config
        room = config.n_positions - room_for
        return build_prompt(request, self.tokenizer, self.layout, config.vocab_size, room)

    def _replies(
        self, name: str, engine: GenerationEngine, writer: PreTrainedModel, prompts: list[Prompt]
    ) -> Workload:
        params, count = self.params, len(prompts)
        requests = [Request(**prompt._asdict(), params=params) for prompt in prompts]
        ids, segments = zip(*prompts, strict=True)
        reads_segments = "token_type_ids" in inspect.signature(writer.forward).parameters

        def ours(turn: int) -> None:
            engine.clear_prefixes()  # of the turn before
            engine.generate(requests)

        def theirs(new_tokens: int) -> None:
            plain.generate(
                writer,
                ids,
                new_tokens,
                segments=segments if reads_segments else None,
                temperature=params.temperature,
                top_p=params.top_p,
            )

        ours(0)
        started = time.perf_counter()
        theirs(1)
        per_token = time.perf_counter() - started
        their_tokens = params.max_length
        note = (
            f"{params.max_length} tokens each, drawn with temperature {params.temperature} and "
            f"top-p {params.top_p}, from token ids; transformers' generate in one batch padded on "
            "the left, "
        )
        # Its name in transformers before 5.24, and since.
        if {"past_key_values", "cache"} & inspect.signature(writer.forward).parameters.keys():
            note += "with its cache of keys and values"
        else:
            their_tokens = max(1, min(params.max_length, int(self.seconds / 4 / per_token)))
            note += "whose class for this model has no cache: it computes all anew for every token"
            if their_tokens < params.max_length:
                note += f", and writes only {their_tokens} of them here, which flatters it"
        if self.weights == "int8":
            note += "; int8 weights here, float32 there"
        return Workload(
            name,
            "tokens",
            Way(ours, params.max_length * count),
            Way(lambda _: theirs(their_tokens), their_tokens * count),
            note,
        )

    def _ranking(self, engine: GenerationEngine, theirs: PreTrainedModel) -> Workload:
        count = min(MAX_CANDIDATES, max(len(turn.candidates) for turn in self.turns))
        turns = [turn for turn in self.turns if len(turn.candidates) >= count]
        # Beside <eos>, and so that a prompt has at least half of the positions.
        longest = self.model.config.n_positions // 2 - 1
        examples = []
        for i in spread(len(turns), NUM_PROMPTS):
            texts: Any = turns[i].candidates[-count:]
            candidates = [ids[:longest] for ids in encode(self.tokenizer, texts)]
            prompt = self._prompt(turns[i].request, max(map(len, candidates)) + 1)
            examples.append((prompt, candidates))

        def rank(turn: int) -> list[float]:
            prompt, candidates = examples[turn % len(examples)]
            ranking = engine.rank(Request(**prompt._asdict()), candidates)
            return [each.score for each in sorted(ranking, key=lambda each: each.index)]

        def rank_plainly(turn: int) -> list[float]:
            batch = self._padded(*examples[turn % len(examples)])
            return plain.rank(theirs, batch, torch.float32)[0].tolist()

        pairs = zip(rank(0), rank_plainly(0), strict=True)
        difference = max(abs(a - b) for a, b in pairs)
        note = (
            f"the candidates of a turn, in float32, from token ids; {self._their_class()} reads "
            "each behind a copy of its prompt, padded, and makes logits of the vocabulary, which "
            f"it cannot leave out; scores differ by at most {difference:.0e}"
        )
        return Workload(
            f"ranking {count} candidates", "rankings", Way(rank, 1), Way(rank_plainly, 1), note
        )

    def _their_class(self) -> str:
        name = families.of(self.model.config).model_class
        has_both = "DoubleHeads" in name
        return f"transformers' {name}" + ("" if has_both else " with a linear head to rank by")

    def _padded(self, prompt: Prompt, candidates: Sequence[Sequence[int]]) -> dict[str, Any]:
        """A turn's candidates as transformers' double-heads classes take them."""
        eos, speaker1, pad = self.layout.eos, self.layout.speaker1, self.layout.pad
        rows = [[*prompt.input_ids, *candidate, eos] for candidate in candidates]
        seq_len, start = max(map(len, rows)), len(prompt.input_ids)
        segments = [*prompt.token_type_ids, *[speaker1] * (seq_len - start)]
        batch = {
            "input_ids": [[row + [pad] * (seq_len - len(row)) for row in rows]],
            "token_type_ids": [[segments] * len(rows)],
            "mc_token_ids": [[len(row) - 1 for row in rows]],
        }
        return {k: torch.tensor(values, device=self.device) for k, values in batch.items()}

    def _training_step(self, store: DialogueStore, theirs: PreTrainedModel) -> Workload:
        options, compute, ranks = self.options, self.compute, Ranks()
        step, stop = TrainStep(self.model, options, compute, ranks), Stop(ranks)
        optimizer = make_optimizer(theirs, 0.0, options.weight_decay, options.adam_beta2)
        self.model.train()
        theirs.train()

        def batches(layout: Layout) -> DialogueBatches:
            return DialogueBatches(
                store,
                "train",
                batch_size=options.train_batch_size,
                num_candidates=options.num_candidates,
                max_history=self.max_history,
                max_length=self.model.config.n_positions,
                layout=layout,
            )

        shared, padded = batches("shared"), batches("padded")
        size = min(options.train_batch_size, shared.num_examples)

        def rows(turn: int) -> np.ndarray:
            return np.random.default_rng(turn).choice(shared.num_examples, size, replace=False)

        def take(turn: int) -> None:
            batch = shared.collate(rows(turn))
            step.take(turn + 1, [(batch, Share(1.0, 1.0))], 1, 0.0, stop)
            step.log.read(ranks)  # which waits for the device

        def take_plainly(turn: int) -> None:
            batch = {k: v.to(self.device) for k, v in tensors_of(padded.collate(rows(turn)))}
            plain.train_step(theirs, optimizer, batch, compute.dtype, options.max_norm)

        take(0)
        take_plainly(0)
        precision = str(compute.dtype).removeprefix("torch.")
        note = (
            f"{size} examples with {options.num_candidates} candidates, products in {precision}: "
            "forward, backward, clipping and fused AdamW; the same examples padded for "
            f"{self._their_class()}; dropout in both if in any, here one mask for the prompt that "
            "candidates share"
        )
        return Workload("training step", "examples", Way(take, size), Way(take_plainly, size), note)
