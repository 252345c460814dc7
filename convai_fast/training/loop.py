"""Fine-tuning: a plain loop, to be read in one sitting."""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from convai_fast.data.batches import Batch, DialogueBatches
from convai_fast.data.dataset import open_dataset
from convai_fast.data.store import DialogueStore
from convai_fast.errors import UserError
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.training.checkpoints import RunFolder, check_output
from convai_fast.training.losses import Metrics, MetricSums, combined_loss
from convai_fast.training.options import TrainOptions, resolve_device, resolve_precision
from convai_fast.training.start import load_model_and_tokenizer


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


def train(options: TrainOptions, report: Callable[[str], None] = print) -> TrainResult:
    """Fine-tune as the options say; see `TrainOptions`.

    Raises UserError for options, data or a model that cannot be used.
    """
    options.check()
    check_output(options.output)
    torch.manual_seed(options.seed)
    model, tokenizer = load_model_and_tokenizer(options, report)
    store = open_dataset(options, tokenizer, options.dataset_cache, report)
    return Trainer(options, model, tokenizer, store, report).run()


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
        self.model = model.to(self.device)
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
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: lr_factor(step, options.warmup_steps, self.total_steps),
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.step = self.epoch = 0
        self.best_nll = math.inf
        self.epochs_without_gain = 0
        self.log = _StepLog(self.device)

    def _batches(self, store: DialogueStore, split: str) -> DialogueBatches:
        options, training = self.options, split == "train"
        return DialogueBatches(
            store,
            split,
            batch_size=options.train_batch_size if training else options.valid_batch_size,
            num_candidates=options.num_candidates if training else 0,
            max_history=options.max_history,
            max_length=self.model.config.n_positions,
            personality_permutations=options.personality_permutations if training else 1,
            max_examples=0 if training else options.valid_examples,
            shuffle=training,
            seed=options.seed,
            pin_memory=self.device.type == "cuda",
        )

    def run(self) -> TrainResult:
        """Train, evaluate and save; returns how it ended."""
        options = self.options
        self.folder = RunFolder(options)
        self._describe()
        before = after = None
        with stop_on_signal() as stop:
            try:
                if options.eval_before_start:
                    before = self.evaluate(stop)
                while self.step < self.total_steps and not stop:
                    self._train_epoch(stop)
                    if stop:
                        break
                    after = self.evaluate(stop)
                    if stop:
                        break
                    self._save(after)
                    if options.patience and self.epochs_without_gain >= options.patience:
                        self.report(f"no better for {options.patience} epochs: stopping early")
                        break
                if self.total_steps == 0 and not stop:
                    after = self.evaluate(stop)
                if stop or self.total_steps == 0:
                    self._save(after)
            finally:
                self.folder.close()
        if stop:
            self.report(f"stopped at step {self.step:,}; saved as {self.folder.path / 'last'}")
        return TrainResult(
            run=self.folder.path,
            before=before,
            after=after,
            stopped_by=stop[0] if stop else None,
            steps=self.step,
            tokens_per_second=self.log.tokens / max(self.log.seconds, 1e-9),
        )

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

    def _train_epoch(self, stop: list) -> None:
        self.model.train()
        self.batches.set_epoch(self.epoch)
        batches = iter(self.batches)
        remaining = len(self.batches)
        with self._progress(f"epoch {self.epoch + 1}") as progress:
            while remaining and self.step < self.total_steps and not stop:
                # The last group of an epoch may be smaller; its mean is still a mean.
                group = min(self.options.gradient_accumulation_steps, remaining)
                remaining -= group
                self._train_step(batches, group)
                progress.update()
                if self.step % self.options.log_every == 0 or self.step == self.total_steps:
                    values = self.log.read(self.scheduler.get_last_lr()[0])
                    self.folder.log(self.step, "train", values)
                    if not math.isfinite(values["loss"]):
                        raise UserError(
                            f"the loss at step {self.step:,} is {values['loss']}: start again with "
                            f"a lower --lr, or with --precision fp32"
                        )
                    progress.set_postfix_str(
                        f"loss {values['loss']:.3f}, {values['tokens_per_second']:,.0f} tokens/s",
                        refresh=False,
                    )
        self.epoch += 1

    def _train_step(self, batches: Iterator[Batch], group: int) -> None:
        """One optimizer step over `group` batches; nothing in it waits for the device."""
        started = time.perf_counter()
        options = self.options
        for _ in range(group):
            batch = next(batches)
            num_tokens = int((batch["mc_token_ids"] + 1).sum())
            with self._autocast():
                output = self.forward(**self._to_device(batch))
                loss = combined_loss(output, options.lm_coef, options.mc_coef)
            self.scaler.scale(loss / group).backward()
            self.log.add(loss, output.loss, output.mc_loss, num_tokens)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(
            self.model.parameters(), options.max_norm or math.inf, foreach=True
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.step += 1
        self.log.end_step(norm, time.perf_counter() - started)

    @torch.inference_mode()
    def evaluate(self, stop: list | None = None) -> Metrics | None:
        """Figures over the validation split; None when it is empty or a signal arrived."""
        if len(self.valid_batches) == 0:
            return None
        self.model.eval()
        sums = MetricSums(self.device)
        progress = tqdm(
            self.valid_batches, "evaluating", leave=False, unit="batch", **_tqdm_settings()
        )
        for batch in progress:
            if stop:
                progress.close()
                return None
            with self._autocast():
                output = self.model(**self._to_device(batch), return_logits=False)
            sums.add(output, batch["labels"], batch["mc_labels"])
        metrics = sums.compute()
        self.folder.log(self.step, "valid", metrics.as_dict())
        self.report(f"step {self.step:,}: {metrics}")
        return metrics

    def _save(self, metrics: Metrics | None) -> None:
        """Save a checkpoint as `last`, and as `best` if it is, or if nothing can tell."""
        best = self.best_nll == math.inf
        if metrics is not None:
            best = metrics.nll < self.best_nll
            self.epochs_without_gain = 0 if best else self.epochs_without_gain + 1
            self.best_nll = metrics.nll if best else self.best_nll
        values = {"step": self.step, "epoch": self.epoch, **(metrics.as_dict() if metrics else {})}
        self.folder.save(self.model, self.tokenizer, self.step, values, best)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _to_device(self, batch: Batch) -> dict[str, Tensor]:
        # Labels stay on the CPU: the model counts them there without waiting for the device.
        return {
            name: tensor if name == "labels" else tensor.to(self.device, non_blocking=True)
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


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, beta2: float
) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices, not on biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
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
        self.tokens, self.seconds = 0, 0.0  # of the whole run
        self._read_tokens, self._read_seconds = 0, 0.0

    def add(self, loss: Tensor, lm_loss: Tensor, mc_loss: Tensor, num_tokens: int) -> None:
        self.losses += torch.stack([loss, lm_loss, mc_loss]).detach()
        self.batches += 1
        self.tokens += num_tokens

    def end_step(self, grad_norm: Tensor, seconds: float) -> None:
        self.grad_norm = grad_norm.detach()
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


@contextmanager
def stop_on_signal() -> Iterator[list[signal.Signals]]:
    """Collects SIGINT and SIGTERM in the list it yields, so that a step can end before the run.

    A second Ctrl-C interrupts at once.
    """
    received: list[signal.Signals] = []

    def receive(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))
        print("\nstopping after this step (again to stop at once) …", file=sys.stderr)

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
