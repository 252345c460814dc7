"""Fine-tuning: a plain loop, to be read in one sitting."""

import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from convai_fast._native import keep_freed_memory
from convai_fast.data.batches import Batch, DialogueBatches
from convai_fast.data.dataset import open_dataset
from convai_fast.data.store import DialogueStore
from convai_fast.data.tokenizer import special_ids
from convai_fast.errors import UserError
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.training.checkpoints import (
    STATE_FORMAT,
    RunFolder,
    check_output,
    read_training_state,
)
from convai_fast.training.guard import FiniteGuard
from convai_fast.training.lora import Lora
from convai_fast.training.losses import Metrics, MetricSums, combined_loss
from convai_fast.training.options import TrainOptions, resolve_device, resolve_precision
from convai_fast.training.resume import CHANGEABLE, resolve_resume
from convai_fast.training.start import load_checkpoint, load_model_and_tokenizer

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
    """

    run: Path
    before: Metrics | None
    after: Metrics | None
    stopped_by: signal.Signals | None
    steps: int
    tokens_per_second: float


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
    if options.resume:
        options = resolve_resume(options, given)
    options.check()
    last, state = Path(options.resume) / "last", None
    if not options.resume:
        check_output(options.output)
    elif last.exists():
        state = read_training_state(last)
    torch.manual_seed(options.seed)
    if state is not None and not options.lora_r:
        model, tokenizer = load_checkpoint(last)
    else:
        model, tokenizer = load_model_and_tokenizer(options, report)
    store = open_dataset(options, tokenizer, options.dataset_cache, report)
    trainer = Trainer(options, model, tokenizer, store, report)
    if state is not None:
        trainer.load_state_dict(state)
    result = trainer.run()
    if result.stopped_by is not None:
        report(f"continue with: convai-fast train --resume {result.run}")
    return result


class Trainer:
    """One run on one device: what `train` does once model and data are there."""

    def __init__(
        self,
        options: TrainOptions,
        model: DoubleHeadsModel,
        tokenizer: PreTrainedTokenizerFast,
        store: DialogueStore,
        report: Callable[[str], None] = print,
    ) -> None:
        self.options, self.tokenizer, self.report = options, tokenizer, report
        self.device = resolve_device(options.device)
        self.dtype = resolve_precision(options.precision, self.device)
        if self.device.type == "cpu" and self.dtype == torch.float16:
            raise UserError("--precision fp16 needs a CUDA device: use bf16 or fp32 on the CPU")
        if self.device.type == "cpu":
            keep_freed_memory()
        ids = special_ids(tokenizer)
        self.lora = Lora(model, options, ids) if options.lora_r else None
        self.model = model.to(self.device)
        model.transformer.gradient_checkpointing = options.gradient_checkpointing
        self.forward = torch.compile(model, dynamic=True) if options.compile else model
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
        self.log = _StepLog(self.device)
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
            shuffle=training,
            seed=options.seed,
            pin_memory=self.device.type == "cuda",
        )

    def run(self) -> TrainResult:
        """Train, evaluate and save, from where the loaded state stands; returns how it ended."""
        options = self.options
        self.folder = RunFolder(options, self._resumed)
        self._describe()
        before = after = stopped_by = None
        with stop_on_signal() as stop:
            try:
                if options.eval_before_start and not self.evaluated_before:
                    before = self.evaluate(stop)
                    self.evaluated_before = True
                while not self.is_finished:
                    self._train_epoch(stop)
                    after = self.evaluate(stop)
                    self._end_epoch(after)
            except _StoppedError:
                stopped_by = stop[0]
                self._save()
                self.report(f"stopped at step {self.step:,}; saved as {self.folder.path / 'last'}")
            finally:
                self.folder.close()
        return TrainResult(
            run=self.folder.path,
            before=before,
            after=after,
            stopped_by=stopped_by,
            steps=self.step,
            tokens_per_second=self.log.tokens / max(self.log.seconds, 1e-9),
        )

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

        Tensors, numbers and texts only, so that it is read without executing anything.
        """
        return {
            "format": STATE_FORMAT,
            "identity": self._identity(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_state(self.device),
            "adapter": self.lora.state_dict() if self.lora else None,
            "log": self.log.state_dict(),
            **self._counters(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state`, of `state_dict`, stands; the weights are loaded already.

        Raises UserError, before anything is changed, when it is the state of another model, other
        dialogues, or a run with other options.
        """
        for name, value in self._identity().items():
            if state["identity"].get(name) != value:
                raise UserError(
                    f"{self.options.resume} cannot be continued: its checkpoint was made with "
                    f"another {name} than there is now; restore it, or start a new run"
                )
        if self.lora:
            self.lora.load_state_dict(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.log.load_state_dict(state["log"])
        for name in _COUNTERS:
            setattr(self, name, state[name])
        set_random_state(state["random"], self.device)
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
            **{f"--{name}": options[name] for name in sorted(fixed)},
        }

    def _describe(self) -> None:
        options, cuts = self.options, self.batches.cuts
        self.report(
            f"training: {self.batches.num_examples:,} examples of {options.num_candidates} "
            f"candidates, {self.total_steps:,} optimizer steps of up to "
            f"{options.train_batch_size} x {options.gradient_accumulation_steps} examples, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        )
        if any(cuts):
            self.report(
                f"cut to {self.model.config.n_positions} positions: history in {cuts.history:,}, "
                f"persona in {cuts.persona:,}, reply in {cuts.reply:,} examples"
            )
        self.report(f"run folder: {self.folder.path}")
        if self.is_finished:
            self.report(f"this run is finished, with {self.step:,} steps: nothing left to do")
        elif self._resumed:
            self.report(f"continuing after step {self.step:,}, in epoch {self.epoch + 1}")

    def _train_epoch(self, stop: list) -> None:
        """The rest of an epoch; one that is done already takes no step."""
        self.model.train()
        self.batches.set_epoch(self.epoch, start=self.batch)
        batches = iter(self.batches)
        with self._progress(f"epoch {self.epoch + 1}") as progress:
            while self.batch < len(self.batches) and self.step < self.total_steps:
                # The last group of an epoch may be smaller; its mean is still a mean.
                remaining = len(self.batches) - self.batch
                group = min(self.options.gradient_accumulation_steps, remaining)
                self._train_step(batches, group, stop)
                progress.update()
                is_logged = self.step % self.options.log_every == 0 or self.step == self.total_steps
                # Elsewhere than on the CPU a look waits for the device, as a record does anyway.
                if is_logged or self.device.type == "cpu" or self.batch == len(self.batches):
                    self._stop_if_not_finite()
                if is_logged:
                    values = self.log.read(self.lr)
                    self.folder.log(self.step, "train", values)
                    progress.set_postfix_str(
                        f"loss {values['loss']:.3f}, {values['tokens_per_second']:,.0f} tokens/s",
                        refresh=False,
                    )
                if self.options.save_every and self.step % self.options.save_every == 0:
                    self._save()

    @property
    def lr(self) -> float:
        """The learning rate of the next optimizer step."""
        factor = lr_factor(self.step, self.options.warmup_steps, self.total_steps)
        return self.options.lr * factor

    def _train_step(self, batches: Iterator[Batch], group: int, stop: list) -> None:
        """One optimizer step over `group` batches; nothing in it waits for the device.

        When a signal arrives it is as if the step had never begun.
        """
        started = time.perf_counter()
        options, random = self.options, random_state(self.device)
        losses, num_tokens = [], 0
        with self._weights_cast_once():
            for _ in range(group):
                if stop:
                    self.optimizer.zero_grad(set_to_none=True)
                    set_random_state(random, self.device)
                    raise _StoppedError
                batch = next(batches)
                num_tokens += count_tokens(batch)
                with self._autocast():
                    output = self.forward(**self._to_device(batch))
                    loss = combined_loss(output, options.lm_coef, options.mc_coef)
                self.scaler.scale(loss / group).backward()
                losses.append(torch.stack([loss, output.loss, output.mc_loss]).detach())
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(
            self.model.parameters(), options.max_norm or math.inf, foreach=True
        ).detach()
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.lr
        losses = torch.stack(losses)
        must_skip = self.guard.check(self.step + 1, losses, norm)
        if not self.scaler.is_enabled():  # which has a look of its own at the gradient
            self.optimizer.found_inf = must_skip
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.batch += group
        self.log.end_step(losses, num_tokens, norm, time.perf_counter() - started)

    def _stop_if_not_finite(self) -> None:
        """Raise UserError if a step since the last look was bad, with its batches set aside."""
        bad = self.guard.read()
        if bad is None:
            return
        # Steps are looked at before their epoch ends, so that the batches are still those.
        size = self.options.gradient_accumulation_steps
        first = (bad.step - 1 - (self.step - -(-self.batch // size))) * size
        path = self.folder.set_aside(
            {
                "step": bad.step,
                "epoch": self.epoch,
                "grad_norm": bad.grad_norm,
                "batches": [self._describe_batch(first + i, bad.losses[i]) for i in bad.culprits],
            }
        )
        raise UserError(
            f"the {bad}: its batches are in {path}, and nothing of it was saved; start again with "
            f"a lower --lr, or with --precision fp32"
        )

    def _describe_batch(self, index: int, losses: list[float]) -> dict[str, Any]:
        batch = self.batches[index]
        if "offsets" in batch:
            rows = batch["input_ids"].tensor_split(batch["offsets"][1:-1])
        else:
            rows = batch["input_ids"].flatten(0, -2)
        return {
            "batch": index,
            **dict(zip(("loss", "lm_loss", "mc_loss"), losses, strict=True)),
            "text": self.tokenizer.batch_decode([row.tolist() for row in rows]),
            **{name: tensor.tolist() for name, tensor in batch.items()},
        }

    @torch.inference_mode()
    def evaluate(self, stop: list | None = None) -> Metrics | None:
        """Figures over the validation split; None when it is empty."""
        if len(self.valid_batches) == 0:
            return None
        self.model.eval()
        sums = MetricSums(self.device)
        progress = tqdm(
            self.valid_batches, "evaluating", leave=False, unit="batch", **_tqdm_settings()
        )
        with self._weights_cast_once():
            for batch in progress:
                if stop:
                    progress.close()
                    raise _StoppedError
                with self._autocast():
                    output = self.model(**self._to_device(batch), return_logits=False)
                sums.add(output, batch["labels"], batch["mc_labels"])
        metrics = sums.compute()
        self.folder.log(self.step, "valid", metrics.as_dict())
        self.report(f"step {self.step:,}: {metrics}")
        return metrics

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
        self.folder.save(self._write_model, values, self.state_dict(), best)
        self._saved = self._counters()

    def _write_model(self, folder: Path) -> None:
        (self.lora or self.model).save_pretrained(folder, self.tokenizer)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _weights_cast_once(self) -> torch.autocast:
        # Autocast forgets the weights that it has cast when the outermost block ends: this is one.
        return torch.autocast(self.device.type, enabled=False)

    def _to_device(self, batch: Batch) -> dict[str, Tensor]:
        # What the model must count stays on the CPU, where it need not wait for the device.
        return {
            name: tensor
            if name in ("labels", "offsets")
            else tensor.to(self.device, non_blocking=True)
            for name, tensor in batch.items()
        }

    def _progress(self, description: str) -> tqdm:
        return tqdm(
            desc=description,
            total=self.total_steps,
            initial=self.step,
            unit="step",
            **_tqdm_settings(),
        )


def count_tokens(batch: Batch) -> int:
    """Tokens that the model reads in a batch, without padding."""
    if "offsets" in batch:
        return len(batch["input_ids"])
    return int((batch["mc_token_ids"] + 1).sum())


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, beta2: float
) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices, not on biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)


def lr_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """The share of the peak learning rate at optimizer step `step`, counted from 0.

    Rises linearly over `warmup_steps`, then falls linearly to 0 at `total_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


class _StepLog:
    """Sums of the steps since the last record, kept on the device until somebody reads them."""

    def __init__(self, device: torch.device) -> None:
        self.losses = torch.zeros(3, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.batches = 0
        self.tokens, self.seconds = 0, 0.0  # of this process
        self._read_tokens, self._read_seconds = 0, 0.0

    def end_step(self, losses: Tensor, num_tokens: int, grad_norm: Tensor, seconds: float) -> None:
        """Count a step; `losses` is float32 [batches, 3]."""
        self.losses += losses.sum(0)
        self.batches += len(losses)
        self.grad_norm = grad_norm
        self.tokens += num_tokens
        self.seconds += seconds

    def read(self, lr: float) -> dict[str, float]:
        loss, lm_loss, mc_loss = (self.losses / self.batches).tolist()
        seconds = max(self.seconds - self._read_seconds, 1e-9)
        values = {
            "loss": loss,
            "lm_loss": lm_loss,
            "mc_loss": mc_loss,
            "grad_norm": self.grad_norm.item(),
            "lr": lr,
            "tokens_per_second": (self.tokens - self._read_tokens) / seconds,
        }
        self.losses.zero_()
        self.batches = 0
        self._read_tokens, self._read_seconds = self.tokens, self.seconds
        return values

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses.copy_(state["losses"])
        self.batches = state["batches"]


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of every generator that dropout on `device` draws from; needs no device wait."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `random_state` returned; the CPU's alone if it comes from another device."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class _StoppedError(Exception):
    """A signal asked the run to end."""


@contextmanager
def stop_on_signal() -> Iterator[list[signal.Signals]]:
    """Collects SIGINT and SIGTERM in the list it yields, so that the run can save before it ends.

    A second Ctrl-C interrupts at once.
    """
    received: list[signal.Signals] = []

    def receive(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))
        print("\nsaving, then stopping (again to stop at once) …", file=sys.stderr)

    watched = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, receive) for number in watched}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _tqdm_settings() -> dict:
    # In a log file a line every half minute is enough.
    return {"mininterval": 0.5 if sys.stderr.isatty() else 30, "dynamic_ncols": True}
