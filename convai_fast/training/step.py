"""One optimizer step: forward and backward over its batches, clipping, AdamW."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from convai_fast.data.batches import Batch, Share, count_labels, count_tokens
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.training.compute import Compute
from convai_fast.training.distributed import Ranks
from convai_fast.training.flops import FlopsCounter, matrix_rate
from convai_fast.training.guard import FiniteGuard
from convai_fast.training.interruption import (
    Stop,
    StoppedError,
    random_state,
    set_random_state,
)
from convai_fast.training.optimizer import make_optimizer
from convai_fast.training.options import TrainOptions
from convai_fast.training.step_log import StepLog


def combined_loss(lm_loss: Tensor, mc_loss: Tensor, lm_coef: float, mc_coef: float) -> Tensor:
    """`lm_coef * lm_loss + mc_coef * mc_loss`, a scalar (TransferTransfo, section 3)."""
    return lm_coef * lm_loss + mc_coef * mc_loss


class TrainStep:
    """Takes optimizer steps on `model`.

    A step's losses are means over all its labelled tokens and all its examples, in whichever
    batches and on whichever ranks they are: gradient accumulation and data parallelism change
    nothing but rounding.

    Attributes:
        optimizer, scaler: the latter does something in fp16 alone.
        guard: knows of the first step whose loss or gradient was no number.
        log: what the steps since the last record add up to.
    """

    def __init__(
        self, model: DoubleHeadsModel, options: TrainOptions, compute: Compute, ranks: Ranks
    ) -> None:
        self.model, self.options, self.compute, self.ranks = model, options, compute, ranks
        if options.compile:  # not what is around them, which looks at values: a graph would end
            for block in model.transformer.blocks:
                block.compile(dynamic=True)
        self.wrapped = ranks.wrap(model, compute.device, options.fsdp)
        self.optimizer = make_optimizer(model, options.lr, options.weight_decay, options.adam_beta2)
        is_fp16 = compute.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=is_fp16)
        self.flops = FlopsCounter(model)
        self.log = StepLog(compute.device, matrix_rate(compute.device, compute.dtype))
        # An overflow is how the scaler finds its scale.
        self.guard = FiniteGuard(
            compute.device, options.gradient_accumulation_steps, check_gradient=not is_fp16
        )

    def take(
        self,
        number: int,
        batches: Iterable[tuple[Batch, Share]],
        num_batches: int,
        lr: float,
        stop: Stop,
    ) -> None:
        """Step `number`, from 1, over its `num_batches` batches; nothing waits for the device.

        Raises StoppedError when a signal arrives; it is then as if the step had never begun.
        """
        random = random_state(self.compute.device)
        try:
            losses, has_choice, num_tokens, flops = self._accumulate(batches, num_batches, stop)
        except StoppedError:
            self.optimizer.zero_grad(set_to_none=True)
            set_random_state(random, self.compute.device)
            raise
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        if self.options.fsdp:
            from torch.distributed.tensor import DTensor

            assert isinstance(norm, DTensor)
            norm = norm.full_tensor()
        # AdamW divides gradients by it as it reads them, so that clipping takes no pass of its own.
        scale = (norm + 1e-6) / (self.options.max_norm or math.inf)
        self.optimizer.grad_scale = scale.clamp(min=1.0)  # type: ignore[attr-defined]
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        losses = self.ranks.sum(losses) / self.ranks.world_size
        must_skip = self.guard.check(number, losses, norm)
        if not self.scaler.is_enabled():  # which has a look of its own at the gradient
            self.optimizer.found_inf = must_skip  # type: ignore[attr-defined]  # as the scaler does
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if lr and self.options.mc_coef and has_choice:
            self.model.head_is_new = False
        self.log.end_step(losses.sum(0), num_tokens, flops, norm, lr)

    def _accumulate(
        self, batches: Iterable[tuple[Batch, Share]], num_batches: int, stop: Stop
    ) -> tuple[Tensor, bool, int, float]:
        """Add up the gradients of a step.

        Returns what each batch adds to the loss and to its parts of either head, float32
        [batches, 3], whether an example had two candidates or more, without which the
        multiple-choice head learns nothing, and how many tokens and floating-point operations that
        were.
        """
        options, parts, has_choice, num_tokens, flops = self.options, [], False, 0, 0.0
        with self.compute.weights_cast_once():
            for i, (batch, share) in enumerate(batches):
                stop.raise_if_asked()
                if share.examples:
                    has_choice |= batch["mc_token_ids"].shape[1] > 1
                    num_labels = count_labels(batch)
                    num_batch_tokens = count_tokens(batch)
                    num_tokens += num_batch_tokens
                    flops += self.flops.count(num_batch_tokens, num_labels)
                # Ranks exchange gradients once a step, when those of its last batch are added.
                self.ranks.exchange_gradients(self.wrapped, i == num_batches - 1)
                with self.compute.autocast():
                    output = self.wrapped(**self.compute.to_device(batch))
                lm_loss, mc_loss = output.loss * share.tokens, output.mc_loss * share.examples
                loss = combined_loss(lm_loss, mc_loss, options.lm_coef, options.mc_coef)
                self.scaler.scale(loss).backward()
                parts.append(torch.stack([loss, lm_loss, mc_loss]).detach())
        return torch.stack(parts), has_choice, num_tokens, flops

    def weights(self) -> dict[str, Tensor]:
        """The model's, as one process without shards has them. Collective."""
        return self._whole(self.model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs beside the weights, as one process has it. Collective."""
        return {
            "optimizer": self._whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "log": self.log.state_dict(),
        }

    def load_state_dict(
        self, optimizer: dict[str, Any], scaler: dict[str, Any], log: dict[str, Any]
    ) -> None:
        """Put back what `state_dict` returned. Collective."""
        if self.options.fsdp:
            from convai_fast.training.sharding import shard_optimizer_state

            optimizer = shard_optimizer_state(optimizer, self.optimizer)
        self.optimizer.load_state_dict(optimizer)
        self.scaler.load_state_dict(scaler)
        self.log.load_state_dict(log)

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        if not self.options.fsdp:
            return state
        from convai_fast.training.sharding import whole

        return whole(state)
