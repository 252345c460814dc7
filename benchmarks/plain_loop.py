"""The training loop that people write over transformers' double-heads classes: the peer of ours."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from convai_fast.data.batches import DialogueBatches
from convai_fast.training.options import TrainOptions


def train_plainly(
    model: PreTrainedModel, batches: DialogueBatches, options: TrainOptions, total_steps: int
) -> Tensor:
    """Train `model` in place on the CPU, with the options of `convai-fast train`.

    Args:
        model: an `OpenAIGPTDoubleHeadsModel` or `GPT2DoubleHeadsModel`.
        batches: in the padded layout; each epoch in the order of its number.
        total_steps: optimizer steps, over as many epochs as that takes.

    Returns the losses of the language-model and of the multiple-choice head at every optimizer
    step, float32 [total_steps, 2], in nats: means over the step's labelled tokens and examples.
    """
    model.train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=options.lr,
        betas=(0.9, options.adam_beta2),
    )
    warmup = options.warmup_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (s + 1) / warmup if s < warmup else (total_steps - s) / (total_steps - warmup),
    )
    epoch, curve = 0, []
    while True:
        batches.set_epoch(epoch)
        for step in batches.steps:
            if len(curve) == total_steps:
                return torch.stack(curve)
            group = [batches[i] for i in step]
            num_tokens = [int((batch["labels"] >= 0).sum()) for batch in group]
            num_examples = [len(batch["mc_labels"]) for batch in group]
            losses = torch.zeros(2)
            for batch, tokens, examples in zip(group, num_tokens, num_examples, strict=True):
                with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
                    output = model(**batch)
                    lm_loss = output.loss * (tokens / sum(num_tokens))
                    mc_loss = output.mc_loss * (examples / sum(num_examples))
                    loss = options.lm_coef * lm_loss + options.mc_coef * mc_loss
                loss.backward()
                losses += torch.stack([lm_loss, mc_loss]).detach().float()
            nn.utils.clip_grad_norm_(model.parameters(), options.max_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            curve.append(losses)
        epoch += 1
