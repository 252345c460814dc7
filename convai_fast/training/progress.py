"""How far a run is."""

import math
from dataclasses import dataclass

from convai_fast.training.evaluation import Metrics


@dataclass
class Progress:
    """What a run has done.

    Attributes:
        step: optimizer steps taken.
        epoch: epochs done.
        examples: examples done of the epoch after these, over all ranks.
        evaluated_before: whether the figures before the first step were taken.
        evaluated_step: the step of the last evaluation; -1 before the first.
        best_step, best_nll: the step whose evaluation was the best so far, and what it found.
        epochs_without_gain: evaluations since then.
    """

    step: int = 0
    epoch: int = 0
    examples: int = 0
    evaluated_before: bool = False
    evaluated_step: int = -1
    best_step: int = -1
    best_nll: float = math.inf
    epochs_without_gain: int = 0

    def end_step(self, num_examples: int) -> None:
        """Note a step over so many examples, of all ranks."""
        self.step += 1
        self.examples += num_examples

    def end_epoch(self) -> None:
        """Note that an epoch is done."""
        self.epoch, self.examples = self.epoch + 1, 0

    def next_evaluation(self, every: int) -> int:
        """The step of the next one of those every so many steps: this one, if it is due."""
        is_due = self.step % every == 0 and self.step not in (0, self.evaluated_step)
        return self.step if is_due else (self.step // every + 1) * every

    def end_evaluation(self, metrics: Metrics | None) -> None:
        """Note what the evaluation of this step has shown; None where there is nothing to see."""
        self.evaluated_step = self.step
        if metrics is None:
            return
        if metrics.nll < self.best_nll:
            self.best_nll, self.best_step = metrics.nll, self.step
            self.epochs_without_gain = 0
        else:
            self.epochs_without_gain += 1
