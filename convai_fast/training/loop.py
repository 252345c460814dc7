"""Fine-tuning: a plain loop, to be read in one sitting."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from convai_fast._native import keep_freed_memory
from convai_fast.data.batches import DialogueBatches
from convai_fast.data.dataset import open_dataset, trained_with
from convai_fast.data.shuffle import seed_of
from convai_fast.data.store import DialogueStore
from convai_fast.data.trained_with import TrainedSource
from convai_fast.dialogue.format import SPECIAL_TOKENS
from convai_fast.errors import UserError
from convai_fast.loading import layout_for
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.terminal import progress_bar, say
from convai_fast.training.checkpoints import TrainingState
from convai_fast.training.compute import Compute, repeatable
from convai_fast.training.distributed import Ranks, join_ranks
from convai_fast.training.evaluation import Metrics, evaluate
from convai_fast.training.guard import describe_batch
from convai_fast.training.interruption import (
    Stop,
    StoppedError,
    random_state,
    set_random_state,
    stop_on_signal,
)
from convai_fast.training.lora import Lora
from convai_fast.training.optimizer import lr_factor
from convai_fast.training.options import TrainOptions
from convai_fast.training.progress import Progress
from convai_fast.training.resume import (
    check_identity,
    describe_kept,
    identity_of,
    resolve_resume,
    resume_command,
)
from convai_fast.training.run_folder import Claim, RunFolder
from convai_fast.training.start import start_or_continue
from convai_fast.training.step import TrainStep
from convai_fast.training.summary import TrainResult, describe


def train(
    options: TrainOptions,
    report: Callable[[str], None] = say,
    given: Collection[str] | None = None,
) -> TrainResult:
    """Fine-tune as the options say, or continue the run `options.resume`; see `TrainOptions`.

    Args:
        given: the options that a run to be continued may not contradict; by default all that differ
            from their defaults.

    Raises UserError for options, data, a model or a run folder that cannot be used.
    """
    with join_ranks() as ranks, Claim() as claim:
        return _train(options, report if ranks.is_main else lambda _: None, given, ranks, claim)


def _train(
    options: TrainOptions,
    report: Callable[[str], None],
    given: Collection[str] | None,
    ranks: Ranks,
    claim: Claim,
) -> TrainResult:
    """What the ranks do; apart from `train`, so that no trainer is left when they part."""
    if options.resume:
        options = ranks.from_main(lambda: resolve_resume(options, given, claim))
    with ranks.together():
        model, tokenizer, state, base, before = start_or_continue(options, report)
    if ranks.world_size > 1:
        # Weights are drawn alike on all ranks; dropout, from here on, is not.
        torch.manual_seed(options.seed + ranks.rank)
    layout = layout_for(tokenizer, model.config)
    folder = ranks.from_main(
        lambda: open_dataset(options, tokenizer, layout, options.dataset_cache, report).folder
    )
    with ranks.together():
        store = DialogueStore(folder)
        device = ranks.device(options.device)
    with repeatable(device, options.deterministic):
        trainer = Trainer(options, model, tokenizer, store, report, ranks, base, before, claim)
        if state is not None:
            trainer.load_state(state)
        result = trainer.run()
    if result.stopped_by is not None:
        report(f"continue with: {resume_command(options, result.run)}")
    return result


class Trainer:
    """One run, or one rank of it: what `train` does once model and data are there.

    On a CPU the process keeps, from then on, the memory that it frees (`keep_freed_memory`).
    `base` is where the weights that LoRA adapts were read, by default `options.model`; `before` is
    what the model has been trained on already, and `claim` that of the run that is continued.
    """

    def __init__(
        self,
        options: TrainOptions,
        model: DoubleHeadsModel,
        tokenizer: PreTrainedTokenizerFast,
        store: DialogueStore,
        report: Callable[[str], None] = say,
        ranks: Ranks = Ranks(),  # noqa: B008
        base: str = "",
        before: Sequence[TrainedSource] = (),
        claim: Claim | None = None,
    ) -> None:
        self.claim = claim
        self.options, self.tokenizer, self.report = options, tokenizer, report
        self.ranks, self.compute = ranks, Compute(options, ranks)
        self.device = self.compute.device
        if self.device.type == "cpu":
            keep_freed_memory()
        vocabulary = tokenizer.get_vocab()
        ids = [vocabulary[token] for token in SPECIAL_TOKENS if token in vocabulary]
        self.lora = Lora(model, options, ids, base) if options.lora_r else None
        self.model = model.to(self.device)
        model.transformer.gradient_checkpointing = options.gradient_checkpointing
        self.trained_with = trained_with(options, store, options.max_history, before)
        self.batches = self._batches(store, "train")
        self.valid_batches = self._batches(store, "valid")
        if self.batches.num_examples == 0:
            raise UserError("the training split is empty: there is nothing to learn from")
        self.train_step = TrainStep(model, options, self.compute, ranks)
        self.log = self.train_step.log
        self.progress = Progress()
        self.total_steps = self._count_steps()
        self._began = time.monotonic()
        self._first_step = 0  # of those that the batches are set to
        self.resumed: TrainingState | None = None  # from where it goes on
        self._saved: Progress | None = None
        self.folder: RunFolder | None = None  # of rank 0, which alone writes to it

    def _batches(self, store: DialogueStore, split: str) -> DialogueBatches:
        options, training = self.options, split == "train"
        return DialogueBatches(
            store,
            split,
            batch_size=options.train_batch_size if training else options.valid_batch_size,
            batch_tokens=options.train_batch_tokens if training else 0,
            batches_per_step=options.gradient_accumulation_steps if training else 1,
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
            device=self.device if options.store_on_device and self.device.type != "cpu" else None,
        )

    def _count_steps(self) -> int:
        """The number of the last step: those that are done, and those that are left."""
        options, progress, batches = self.options, self.progress, self.batches
        total = progress.step
        if progress.epoch < options.n_epochs:
            whole_epochs = options.n_epochs - progress.epoch - 1
            total += batches.num_steps(progress.epoch, progress.examples)
            total += whole_epochs * batches.num_steps(progress.epoch + 1)
        return min(total, options.max_steps) if options.max_steps else total

    def run(self) -> TrainResult:
        """Train, evaluate and save, from where the loaded state stands; returns how it ended."""
        # Rank 0 writes to the run folder; the others know where it is.
        self.path = self.ranks.from_main(self._open_folder)
        for line in describe(self):
            self.report(line)
        with stop_on_signal(self.ranks) as stop:
            try:
                before, after, stopped_by = self._train(stop)
            except KeyboardInterrupt:  # the second Ctrl-C, also while the first one's save goes on
                for line in describe_kept(self.options, self.path):
                    self.report(line)
                raise
            finally:
                if self.folder:
                    self.folder.close()
        tokens = self.ranks.sum(torch.tensor(self.log.tokens)).item()
        return TrainResult(
            run=self.path,
            options=self.options,
            before=before,
            after=after,
            stopped_by=stopped_by,
            seconds=self.seconds,
            is_resumed=self.resumed is not None,
            steps=self.progress.step,
            tokens_per_second=tokens / max(self.log.seconds, 1e-9),
            mfu=self.log.mfu,
        )

    def _train(self, stop: Stop) -> tuple[Metrics | None, Metrics | None, signal.Signals | None]:
        """Figures before and after, and the signal that ended it, if one did; then all is saved."""
        before = after = None
        try:
            if self.options.eval_before_start and not self.progress.evaluated_before:
                before = self.evaluate(stop)
                self.progress.evaluated_before = True
            while not self.is_finished:
                self._train_stretch(stop)
                is_evaluated = self._evaluation_is_due
                if is_evaluated:
                    after = self.evaluate(stop)
                if self.progress.examples == self.batches.num_examples:
                    self.progress.end_epoch()
                if is_evaluated:
                    self._end_evaluation(after)
        except StoppedError:
            self._save()
            self.report(f"stopped at step {self.progress.step:,}; saved as {self.path / 'last'}")
            return before, after, stop.signal
        return before, after, None

    def _open_folder(self) -> Path:
        self.folder = RunFolder(self.options, self.resumed, self.claim)
        if self.lora:
            self.lora.keep_base(self.folder.path)
        return self.folder.path

    def _own_folder(self) -> RunFolder:
        assert self.folder is not None  # on rank 0, while the run lasts
        return self.folder

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to train, evaluate or save."""
        progress = self.progress
        enough = progress.step >= self.total_steps or self._is_out_of_patience
        return enough and progress.evaluated_step == progress.step

    @property
    def _is_out_of_patience(self) -> bool:
        return 0 < self.options.patience <= self.progress.epochs_without_gain

    @property
    def seconds(self) -> float:
        """The time that the run has taken so far, in this process and those before it."""
        before = self.resumed.seconds if self.resumed else 0.0
        return before + time.monotonic() - self._began

    # ---- training ---------------------------------------------------------------------------

    def _train_stretch(self, stop: Stop) -> None:
        """The steps until the epoch ends or an evaluation is due; none if one is due now."""
        options, progress, batches = self.options, self.progress, self.batches
        self.model.train()
        batches.set_epoch(progress.epoch, start=progress.examples)
        self._first_step, total = progress.step, self.total_steps
        last = min(progress.step + len(batches.steps), total)
        if options.eval_every:
            last = min(last, progress.next_evaluation(options.eval_every))
        steps = batches.steps[: max(0, last - progress.step)]
        if not steps:
            return
        name = f"epoch {progress.epoch + 1}, to step {last:,}"
        with self._bar(desc=name, unit="step", total=len(steps)) as bar:
            for step, num_examples in zip(steps, batches.step_examples, strict=False):
                started = time.perf_counter()
                own = ((batches[i], batches.shares[i]) for i in step)
                lr = options.lr * lr_factor(progress.step, options.warmup_steps, total)
                self.train_step.take(progress.step + 1, own, len(step), lr, stop)
                progress.end_step(num_examples)
                bar.update()
                number = progress.step
                is_logged = number % options.log_every == 0 or number == total
                is_last = number == last
                # Elsewhere than on the CPU a look waits for the device, as a record does anyway.
                if is_logged or self.device.type == "cpu" or is_last:
                    self._stop_if_not_finite()
                self.log.seconds += time.perf_counter() - started
                if is_logged:
                    values = self.log.read(self.ranks)
                    self._record("train", values)
                    bar.set_postfix_str(
                        f"loss {values['loss']:.3f}, {values['tokens_per_second']:,.0f} tokens/s, "
                        f"mfu {values['mfu']:.0%}",
                        refresh=False,
                    )
                if options.save_every and number % options.save_every == 0:
                    self._save()

    def _stop_if_not_finite(self) -> None:
        """Raise UserError if a step since the last look was bad, with its batches set aside."""
        bad = self.train_step.guard.read()
        if bad is None:
            return
        # Steps are looked at before their epoch ends, so that the batches are still those.
        step = self.batches.steps[bad.step - 1 - self._first_step]
        own = [
            describe_batch(step[i], self.batches[step[i]], bad.losses[i], self.tokenizer)
            for i in bad.culprits
        ]
        record = {
            "step": bad.step,
            "epoch": self.progress.epoch,
            "grad_norm": bad.grad_norm,
            "batches": [part for parts in self.ranks.gather(own) for part in parts],
        }
        try:
            path = self.ranks.from_main(lambda: self._own_folder().set_aside(record))
            where = f"its batches are in {path}"
        except UserError as error:
            where = str(error)
        raise UserError(
            f"the {bad}: {where}, and nothing of it was saved; start again with a lower `lr`, or "
            f"with `precision` fp32"
        )

    def evaluate(self, stop: Stop | None = None) -> Metrics | None:
        """Figures over the validation split; None when it is empty."""
        if self.valid_batches.num_examples == 0:
            return None
        batches = self.valid_batches
        with self._bar(items=batches, desc="evaluating", unit="batch", leave=False) as bar:
            metrics = evaluate(self.model, bar, self.compute, self.ranks, stop)
        self._record("valid", metrics.as_dict())
        self.report(f"step {self.progress.step:,}: {metrics}")
        return metrics

    @property
    def _evaluation_is_due(self) -> bool:
        every, step = self.options.eval_every, self.progress.step
        return not every or step % every == 0 or step == self.total_steps

    def _end_evaluation(self, metrics: Metrics | None) -> None:
        """Note and save what an evaluation has shown."""
        self.progress.end_evaluation(metrics)
        self._save(metrics)
        if self._is_out_of_patience:
            self.report(f"no better in {self.options.patience} evaluations: stopping early")

    # ---- saving and continuing --------------------------------------------------------------

    def _save(self, metrics: Metrics | None = None) -> None:
        """Save a checkpoint as `last`, and as `best` if it is, or if nothing can tell."""
        progress = self.progress
        if progress == self._saved:
            return
        self._stop_if_not_finite()
        if progress.best_nll == math.inf:
            progress.best_step = progress.step
        values = {
            "step": progress.step,
            "epoch": progress.epoch,
            "finished": self.is_finished,
            **(metrics.as_dict() if metrics else {}),
        }
        weights = None if self.lora else self.train_step.weights()
        state = self.state()

        def write_model(folder: Path) -> None:
            if self.lora:
                self.lora.save_pretrained(folder, self.tokenizer)
            else:
                self.model.save_pretrained(folder, self.tokenizer, weights)
            self.trained_with.write(folder)

        is_best = progress.best_step == progress.step
        self.ranks.from_main(lambda: self._own_folder().save(write_model, values, state, is_best))
        self._saved = dataclasses.replace(progress)

    def state(self) -> TrainingState:
        """What the run needs to continue, complete on rank 0. Collective."""
        return TrainingState(
            identity=identity_of(self),
            progress=dataclasses.replace(self.progress),
            **self.train_step.state_dict(),
            random=self.ranks.gather(random_state(self.device)),
            adapter=self.lora.state_dict() if self.lora else None,
            seconds=self.seconds,
        )

    def load_state(self, state: TrainingState) -> None:
        """Continue where `state` stands; the weights are loaded already.

        With another number of processes dropout is drawn anew; else a run on one CPU goes on bit
        for bit.

        Raises UserError, before anything is changed, when it is the state of another model, other
        dialogues, or a run with other options. Collective.
        """
        check_identity(self, state.identity)
        if self.lora:
            assert state.adapter is not None  # its --lora_r is that of now
            self.lora.load_state_dict(state.adapter)
        self.train_step.load_state_dict(state.optimizer, state.scaler, state.log)
        self.progress = dataclasses.replace(state.progress)
        self.total_steps = self._count_steps()
        if len(state.random) == self.ranks.world_size:
            set_random_state(state.random[self.ranks.rank], self.device)
        else:
            torch.manual_seed(seed_of(self.options.seed, self.progress.step, self.ranks.rank))
        self.resumed, self._saved = state, dataclasses.replace(state.progress)

    def _record(self, split: str, values: dict[str, float]) -> None:
        # A disk that is full ends all ranks alike.
        def log() -> None:
            if self.folder is not None:  # one can evaluate without a run
                self.folder.log(self.progress.step, split, values)

        self.ranks.from_main(log)

    def _bar(self, **settings: Any) -> tqdm:
        return progress_bar(disable=not self.ranks.is_main, **settings)
