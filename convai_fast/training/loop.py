"""Fine-tuning: a plain loop, to be read in one sitting."""

import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from convai_fast._native import keep_freed_memory
from convai_fast.data.batches import Batch, DialogueBatches, Share, count_tokens
from convai_fast.data.dataset import open_dataset, trained_with, unknown_share
from convai_fast.data.store import DialogueStore
from convai_fast.data.trained_with import TrainedSource
from convai_fast.dialogue.format import IGNORED
from convai_fast.dialogue.tokenizer import special_ids
from convai_fast.errors import UserError
from convai_fast.hardware import resolve_precision
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.layers import to_device
from convai_fast.training.checkpoints import STATE_FORMAT
from convai_fast.training.distributed import Ranks, join_ranks
from convai_fast.training.flops import FlopsCounter, matrix_rate
from convai_fast.training.guard import FiniteGuard, describe_batch
from convai_fast.training.interruption import (
    Stop,
    StoppedError,
    random_state,
    set_random_state,
    stop_on_signal,
)
from convai_fast.training.lora import Lora
from convai_fast.training.losses import Metrics, MetricSums, StepLog, combined_loss
from convai_fast.training.optimizer import lr_factor, make_optimizer
from convai_fast.training.options import TrainOptions
from convai_fast.training.resume import CHANGEABLE, resolve_resume, resume_command
from convai_fast.training.run_folder import RunFolder
from convai_fast.training.start import start_or_continue

# How far a run is, as `Trainer.state_dict` saves it.
_COUNTERS = (
    "step",
    "epoch",
    "batch",
    "evaluated_before",
    "evaluated_step",
    "best_nll",
    "best_step",
    "epochs_without_gain",
)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        run: the run folder; `run / "best"` and `run / "last"` are its checkpoints.
        before: figures before training, if asked for.
        after: figures of the last evaluation; None if there was none.
        stopped_by: the signal that ended the run early, or None.
        mfu: model-flops utilisation, the share of the device's measured matrix rate that was used.
    """

    run: Path
    before: Metrics | None
    after: Metrics | None
    stopped_by: signal.Signals | None
    steps: int
    tokens_per_second: float
    mfu: float


def train(
    options: TrainOptions,
    report: Callable[[str], None] = print,
    given: Collection[str] | None = None,
) -> TrainResult:
    """Fine-tune as the options say, or continue the run `options.resume`; see `TrainOptions`.

    Args:
        given: the options that a run to be continued may not contradict; by default all that differ
            from their defaults.

    Raises UserError for options, data, a model or a run folder that cannot be used.
    """
    with join_ranks() as ranks:
        return _train(options, report if ranks.is_main else lambda _: None, given, ranks)


def _train(
    options: TrainOptions,
    report: Callable[[str], None],
    given: Collection[str] | None,
    ranks: Ranks,
) -> TrainResult:
    """What the ranks do; apart from `train`, so that no trainer is left when they part."""
    if options.resume:
        options = ranks.from_main(lambda: resolve_resume(options, given))
    with ranks.together():
        model, tokenizer, state, base, before = start_or_continue(options, report)
    if ranks.world_size > 1:
        # Weights are drawn alike on all ranks; dropout, from here on, is not.
        torch.manual_seed(options.seed + ranks.rank)
    folder = ranks.from_main(
        lambda: open_dataset(options, tokenizer, options.dataset_cache, report).folder
    )
    with ranks.together():
        store = DialogueStore(folder)
    trainer = Trainer(options, model, tokenizer, store, report, ranks, base, before)
    if state is not None:
        trainer.load_state_dict(state)
    result = trainer.run()
    if result.stopped_by is not None:
        report(f"continue with: {resume_command(options, result.run)}")
    return result


class Trainer:
    """One run, or one rank of it: what `train` does once model and data are there.

    On a CPU the process keeps, from then on, the memory that it frees (`keep_freed_memory`).
    `base` is where the weights that LoRA adapts were read, by default `options.model`; `before` is
    what the model has been trained on already.
    """

    def __init__(
        self,
        options: TrainOptions,
        model: DoubleHeadsModel,
        tokenizer: PreTrainedTokenizerFast,
        store: DialogueStore,
        report: Callable[[str], None] = print,
        ranks: Ranks = Ranks(),  # noqa: B008
        base: str = "",
        before: Sequence[TrainedSource] = (),
    ) -> None:
        self.options, self.tokenizer, self.report = options, tokenizer, report
        self.ranks = ranks
        with ranks.together():
            self.device = ranks.device(options.device)
        self.dtype = resolve_precision(options.precision, self.device)
        if self.device.type == "cpu" and self.dtype == torch.float16:
            raise UserError("--precision fp16 needs a CUDA device: use bf16 or fp32 on the CPU")
        if options.fsdp and self.dtype == torch.float16:
            raise UserError("--fsdp and --precision fp16 do not go together: use bf16 or fp32")
        if self.device.type == "cpu":
            keep_freed_memory()
        ids = special_ids(tokenizer)
        self.lora = Lora(model, options, ids, base) if options.lora_r else None
        self.model = model.to(self.device)
        model.transformer.gradient_checkpointing = options.gradient_checkpointing
        self.wrapped = self.forward = ranks.wrap(model, self.device, options.fsdp)
        if options.compile:
            self.forward = torch.compile(self.wrapped, dynamic=True)
        self.trained_with = trained_with(options, store, options.max_history, before)
        self.batches = self._batches(store, "train")
        self.valid_batches = self._batches(store, "valid")
        if len(self.batches) == 0:
            raise UserError("the training split is empty: there is nothing to learn from")

        self.steps_per_epoch = -(-len(self.batches) // options.gradient_accumulation_steps)
        self.total_steps = options.n_epochs * self.steps_per_epoch
        if options.max_steps:
            self.total_steps = min(self.total_steps, options.max_steps)
        self.optimizer = make_optimizer(model, options.lr, options.weight_decay, options.adam_beta2)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        # Optimizer steps done, epochs done, and batches done of the next epoch.
        self.step = self.epoch = self.batch = 0
        self.evaluated_before = False
        self.evaluated_step, self.best_step = -1, -1
        self.best_nll = math.inf
        self.epochs_without_gain = 0
        self.flops = FlopsCounter(model)
        self.log = StepLog(self.device, matrix_rate(self.device, self.dtype))
        self.guard = FiniteGuard(
            self.device, options.gradient_accumulation_steps, not self.scaler.is_enabled()
        )
        self._resumed: dict[str, Any] | None = None
        self._saved: dict[str, Any] | None = None

    def _batches(self, store: DialogueStore, split: str) -> DialogueBatches:
        options, training = self.options, split == "train"
        return DialogueBatches(
            store,
            split,
            batch_size=options.train_batch_size if training else options.valid_batch_size,
            num_candidates=options.num_candidates if training else 0,
            max_history=options.max_history,
            max_length=self.model.config.n_positions,
            layout=options.layout,
            personality_permutations=options.personality_permutations if training else 1,
            max_examples=0 if training else options.valid_examples,
            weights=[source.weight for source in self.trained_with.sources] if training else (),
            shuffle=training,
            seed=options.seed,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            pin_memory=self.device.type == "cuda",
        )

    def run(self) -> TrainResult:
        """Train, evaluate and save, from where the loaded state stands; returns how it ended."""
        options = self.options
        # Rank 0 writes to the run folder; the others know where it is.
        self.folder: RunFolder | None = None
        self.path = self.ranks.from_main(self._open_folder)
        self._describe()
        before = after = stopped_by = None
        with stop_on_signal(self.ranks) as stop:
            try:
                if options.eval_before_start and not self.evaluated_before:
                    before = self.evaluate(stop)
                    self.evaluated_before = True
                while not self.is_finished:
                    self._train_epoch(stop)
                    after = self.evaluate(stop)
                    self._end_epoch(after)
            except StoppedError:
                stopped_by = stop.signal
                self._save()
                self.report(f"stopped at step {self.step:,}; saved as {self.path / 'last'}")
            finally:
                if self.folder:
                    self.folder.close()
        tokens = self.ranks.sum(torch.tensor(self.log.tokens)).item()
        return TrainResult(
            run=self.path,
            before=before,
            after=after,
            stopped_by=stopped_by,
            steps=self.step,
            tokens_per_second=tokens / max(self.log.seconds, 1e-9),
            mfu=self.log.mfu,
        )

    def _open_folder(self) -> Path:
        self.folder = RunFolder(self.options, self._resumed)
        if self.lora:
            self.lora.keep_base(self.folder.path)
        return self.folder.path

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to train, evaluate or save."""
        enough = self.step >= self.total_steps or self._is_out_of_patience
        return enough and self.evaluated_step == self.step

    @property
    def _is_out_of_patience(self) -> bool:
        return 0 < self.options.patience <= self.epochs_without_gain

    def state_dict(self) -> dict[str, Any]:
        """All but the weights that a run needs to continue bit for bit, at an optimizer step.

        Tensors, numbers and texts only, so that it is read without executing anything. Collective.
        """
        own = {"random": random_state(self.device), "log": self.log.state_dict()}
        return {
            "format": STATE_FORMAT,
            "identity": self._identity(),
            "optimizer": self._whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "ranks": self.ranks.gather(own),
            "adapter": self.lora.state_dict() if self.lora else None,
            **self._counters(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state`, of `state_dict`, stands; the weights are loaded already.

        Raises UserError, before anything is changed, when it is the state of another model, other
        dialogues, or a run with other options or another number of processes. Collective.
        """
        for name, value in self._identity().items():
            if state["identity"].get(name) != value:
                raise UserError(
                    f"{self.options.resume} cannot be continued: its checkpoint was made with "
                    f"another {name} than there is now; restore it, or start a new run"
                )
        if self.lora:
            self.lora.load_state_dict(state["adapter"])
        optimizer, own = state["optimizer"], state["ranks"][self.ranks.rank]
        if self.options.fsdp:
            from convai_fast.training.sharding import shard_optimizer_state

            optimizer = shard_optimizer_state(optimizer, self.optimizer)
        self.optimizer.load_state_dict(optimizer)
        self.scaler.load_state_dict(state["scaler"])
        self.log.load_state_dict(own["log"])
        for name in _COUNTERS:
            setattr(self, name, state[name])
        set_random_state(own["random"], self.device)
        self._resumed, self._saved = state, self._counters()

    def _counters(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _COUNTERS}

    def _identity(self) -> dict[str, Any]:
        """What must be the same for the position in the epoch and the tensors to mean the same."""
        store = self.batches.store
        options = dataclasses.asdict(self.options)
        fixed = options.keys() - {*CHANGEABLE, "resume", "output"}
        base = {"base model": self.lora.base_checksum} if self.lora else {}
        return {
            **base,
            "model shape (config.json)": self.model.config.to_transformers(),
            "tokenizer": store.meta["tokenizer"],
            "set of dialogues": store.meta["fingerprint"],
            "weighting of data sets": [source.weight for source in self.trained_with.sources],
            "number of processes": self.ranks.world_size,
            **{f"--{name}": options[name] for name in sorted(fixed)},
        }

    def _describe(self) -> None:
        options, cuts, ranks = self.options, self.batches.cuts, self.ranks.world_size
        self.report(
            f"training: {self.batches.num_examples:,} examples of {options.num_candidates} "
            f"candidates, {self.total_steps:,} optimizer steps of up to "
            f"{options.train_batch_size} x {options.gradient_accumulation_steps} examples"
            f"{f' x {ranks} processes' if ranks > 1 else ''}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        )
        if any(cuts):
            self.report(
                f"cut to {self.model.config.n_positions} positions: history in {cuts.history:,}, "
                f"persona in {cuts.persona:,}, reply in {cuts.reply:,} examples"
            )
        if unknown := unknown_share(self.batches.store):
            self.report(unknown)
        own = self.trained_with
        earlier = dataclasses.replace(own, sources=own.before, before=())
        if overlap := earlier.overlap([(source.path, source.origins) for source in own.sources]):
            self.report(f"WARNING: {overlap}; give the same, or the figures are too good")
        self.report(f"run folder: {self.path}")
        if options.compile and not self.is_finished:
            self.report("compiling: the first step takes about a minute")
        if self.is_finished:
            self.report(f"this run is finished, with {self.step:,} steps: nothing left to do")
        elif self._resumed:
            self.report(f"continuing after step {self.step:,}, in epoch {self.epoch + 1}")
        elif options.resume:
            self.report("nothing was saved in this run yet: beginning it anew")

    def _train_epoch(self, stop: Stop) -> None:
        """The rest of an epoch; one that is done already takes no step."""
        self.model.train()
        self.batches.set_epoch(self.epoch, start=self.batch)
        batches = zip(self.batches, self.batches.shares[self.batch :], strict=True)
        with self._progress(f"epoch {self.epoch + 1}") as progress:
            while self.batch < len(self.batches) and self.step < self.total_steps:
                # The last group of an epoch may be smaller; its mean is still a mean.
                remaining = len(self.batches) - self.batch
                group = min(self.options.gradient_accumulation_steps, remaining)
                started = time.perf_counter()
                self._train_step(batches, group, stop)
                progress.update()
                is_logged = self.step % self.options.log_every == 0 or self.step == self.total_steps
                # Elsewhere than on the CPU a look waits for the device, as a record does anyway.
                if is_logged or self.device.type == "cpu" or self.batch == len(self.batches):
                    self._stop_if_not_finite()
                self.log.seconds += time.perf_counter() - started
                if is_logged:
                    values = self.log.read(self.lr, self.ranks)
                    self._record("train", values)
                    progress.set_postfix_str(
                        f"loss {values['loss']:.3f}, {values['tokens_per_second']:,.0f} tokens/s, "
                        f"mfu {values['mfu']:.0%}",
                        refresh=False,
                    )
                if self.options.save_every and self.step % self.options.save_every == 0:
                    self._save()

    @property
    def lr(self) -> float:
        """The learning rate of the next optimizer step."""
        factor = lr_factor(self.step, self.options.warmup_steps, self.total_steps)
        return self.options.lr * factor

    def _train_step(self, batches: Iterator[tuple[Batch, Share]], group: int, stop: Stop) -> None:
        """One optimizer step over `group` batches; nothing in it waits for the device.

        When a signal arrives it is as if the step had never begun.
        """
        options, random = self.options, random_state(self.device)
        losses, num_tokens, flops = [], 0, 0.0
        with self._weights_cast_once():
            for i in range(group):
                if stop.poll():
                    self.optimizer.zero_grad(set_to_none=True)
                    set_random_state(random, self.device)
                    raise StoppedError
                batch, share = next(batches)
                if share.examples:
                    num_labels = int((batch["labels"] != IGNORED).sum())
                    num_batch_tokens = count_tokens(batch)
                    num_tokens += num_batch_tokens
                    flops += self.flops.count(num_batch_tokens, num_labels)
                # Ranks exchange gradients once a step, when those of its last batch are added.
                self.ranks.exchange_gradients(self.wrapped, i == group - 1)
                with self._autocast():
                    output = self.forward(**self._to_device(batch))
                lm_loss, mc_loss = output.loss * share.tokens, output.mc_loss * share.examples
                loss = combined_loss(lm_loss, mc_loss, options.lm_coef, options.mc_coef)
                self.scaler.scale(loss / group).backward()
                losses.append(torch.stack([loss, lm_loss, mc_loss]).detach())
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(
            self.model.parameters(), options.max_norm or math.inf, foreach=True
        ).detach()
        if options.fsdp:
            norm = norm.full_tensor()
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.lr
        losses = self.ranks.sum(torch.stack(losses)) / self.ranks.world_size
        must_skip = self.guard.check(self.step + 1, losses, norm)
        if not self.scaler.is_enabled():  # which has a look of its own at the gradient
            self.optimizer.found_inf = must_skip
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.batch += group
        self.log.end_step(losses, num_tokens, flops, norm)

    def _stop_if_not_finite(self) -> None:
        """Raise UserError if a step since the last look was bad, with its batches set aside."""
        bad = self.guard.read()
        if bad is None:
            return
        # Steps are looked at before their epoch ends, so that the batches are still those.
        size = self.options.gradient_accumulation_steps
        first = (bad.step - 1 - (self.step - -(-self.batch // size))) * size
        own = [
            describe_batch(first + i, self.batches[first + i], bad.losses[i], self.tokenizer)
            for i in bad.culprits
        ]
        record = {
            "step": bad.step,
            "epoch": self.epoch,
            "grad_norm": bad.grad_norm,
            "batches": [part for parts in self.ranks.gather(own) for part in parts],
        }
        try:
            path = self.ranks.from_main(lambda: self.folder.set_aside(record))
            where = f"its batches are in {path}"
        except UserError as error:
            where = str(error)
        raise UserError(
            f"the {bad}: {where}, and nothing of it was saved; start again with a lower --lr, or "
            f"with --precision fp32"
        )

    @torch.no_grad()  # not inference_mode, whose tensors FSDP cannot train with afterwards
    def evaluate(self, stop: Stop | None = None) -> Metrics | None:
        """Figures over the validation split; None when it is empty."""
        if len(self.valid_batches) == 0:
            return None
        self.model.eval()
        sums = MetricSums(self.device)
        progress = tqdm(
            self.valid_batches, "evaluating", leave=False, unit="batch", **self._tqdm_settings()
        )
        with self._weights_cast_once():
            for batch in progress:
                if stop is not None and stop.poll():
                    progress.close()
                    raise StoppedError
                with self._autocast():
                    output = self.model(**self._to_device(batch), return_logits=False)
                sums.add(output, batch["labels"], batch["mc_labels"])
        metrics = sums.compute(self.ranks)
        self._record("valid", metrics.as_dict())
        self.report(f"step {self.step:,}: {metrics}")
        return metrics

    def _record(self, split: str, values: dict[str, float]) -> None:
        # A disk that is full ends all ranks alike.
        self.ranks.from_main(lambda: self.folder and self.folder.log(self.step, split, values))

    def _end_epoch(self, metrics: Metrics | None) -> None:
        """Note and save what the evaluation after an epoch, or after the last step, has shown."""
        if self.batch == len(self.batches):
            self.epoch, self.batch = self.epoch + 1, 0
        self.evaluated_step = self.step
        if metrics is not None and metrics.nll < self.best_nll:
            self.best_nll, self.best_step = metrics.nll, self.step
            self.epochs_without_gain = 0
        elif metrics is not None:
            self.epochs_without_gain += 1
        self._save(metrics)
        if self._is_out_of_patience:
            self.report(f"no better for {self.options.patience} epochs: stopping early")

    def _save(self, metrics: Metrics | None = None) -> None:
        """Save a checkpoint as `last`, and as `best` if it is, or if nothing can tell."""
        if self._counters() == self._saved:
            return
        self._stop_if_not_finite()
        if self.best_nll == math.inf:
            self.best_step = self.step
        values = {
            "step": self.step,
            "epoch": self.epoch,
            "finished": self.is_finished,
            **(metrics.as_dict() if metrics else {}),
        }
        best = self.best_step == self.step
        weights = None if self.lora else self._whole(self.model.state_dict())
        state = self.state_dict()

        def write_model(folder: Path) -> None:
            if self.lora:
                self.lora.save_pretrained(folder, self.tokenizer)
            else:
                self.model.save_pretrained(folder, self.tokenizer, weights)
            self.trained_with.write(folder)

        self.ranks.from_main(lambda: self.folder.save(write_model, values, state, best))
        self._saved = self._counters()

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` as one rank without shards has it. Collective."""
        if not self.options.fsdp:
            return state
        from convai_fast.training.sharding import whole

        return whole(state)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _weights_cast_once(self) -> AbstractContextManager:
        # Autocast forgets the weights that it has cast when the outermost block ends: this is one.
        # With shards it must forget them sooner, or each rank would keep the whole model.
        if self.options.fsdp:
            return nullcontext()
        return torch.autocast(self.device.type, enabled=False)

    def _to_device(self, batch: Batch) -> dict[str, Tensor]:
        # What the model must count stays on the CPU, where it need not wait for the device.
        return {
            name: tensor if name in ("labels", "offsets") else to_device(tensor, self.device)
            for name, tensor in batch.items()
        }

    def _progress(self, description: str) -> tqdm:
        return tqdm(
            desc=description,
            total=self.total_steps,
            initial=self.step,
            unit="step",
            **self._tqdm_settings(),
        )

    def _tqdm_settings(self) -> dict:
        # In a log file a line every half minute is enough.
        return {
            "mininterval": 0.5 if sys.stderr.isatty() else 30,
            "dynamic_ncols": True,
            "disable": not self.ranks.is_main,
        }
