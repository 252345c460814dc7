"""Every option of `convai-fast train`, documented once.

A class is a group of them, as `convai-fast train --help` shows it.
"""

from dataclasses import dataclass
from typing import Literal, cast, get_args

from convai_fast.data.options import DataOptions, Layout, texts
from convai_fast.errors import UserError
from convai_fast.extras import require
from convai_fast.options import Precision, check_at_least

ReportTo = Literal["tensorboard", "wandb", "trackio", "none"]


@dataclass
class ExampleOptions:
    """Examples: what of a dialogue the model sees at a time."""

    num_candidates: int = 2
    """Candidates an example in training, the last ones: the true reply and num_candidates - 1
    distractors. Validation uses all."""
    max_history: int = 2
    """Exchanges of history an example keeps (2 * max_history + 1 turns)."""
    personality_permutations: int = 1
    """See each example so often, each time with its persona sentences rotated by one more."""
    dataset_cache: str = "dataset_cache"
    """Folder in which tokenised dialogues are kept for the next run."""


@dataclass
class ModelOptions:
    """Model: what the training starts from."""

    model: str = "openai-community/openai-gpt"
    """Folder, .tar.gz or Hub id of the model; with --from_scratch, a folder with config.json is
    enough."""
    tokenizer: str = ""
    """Folder or Hub id of the tokenizer, if not the model's."""
    from_scratch: bool = False
    """Start from random weights of the model's shape instead of its trained weights."""
    segments: bool = False
    """Let a Llama, Mistral or Qwen read with each token who speaks, as GPTs do: two embeddings that
    begin as zeros."""


@dataclass
class StepOptions:
    """Optimiser: how much is learnt of what in a step, and how many steps there are."""

    train_batch_size: int = 4
    """Examples a batch in training."""
    train_batch_tokens: int = 0
    """Tokens a batch in training, at most, in place of --train_batch_size: as many examples of
    similar length as fit, and one at least; 0: go by --train_batch_size."""
    gradient_accumulation_steps: int = 8
    """Batches an optimizer step."""
    n_epochs: int = 3
    """Passes over the training split."""
    max_steps: int = 0
    """Stop after so many optimizer steps, even within an epoch; 0: no limit."""
    lr: float = 6.25e-5
    """Peak learning rate; it decays linearly to 0 over the run."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate first rises linearly from 0."""
    weight_decay: float = 0.01
    """AdamW's weight decay, on matrices only."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients; lower follows a young model's changes faster."""
    max_norm: float = 1.0
    """Clip the gradient to this norm, once an optimizer step; 0: do not clip."""
    lm_coef: float = 1.0
    """Weight of the language-model loss."""
    mc_coef: float = 1.0
    """Weight of the multiple-choice loss."""
    seed: int = 42
    """Seed of weights, dropout and the order of examples."""


@dataclass
class LoraOptions:
    """LoRA: small adapters, trained in place of the weights."""

    lora_r: int = 0
    """Rank of LoRA adapters on all linear layers, trained in place of the weights, beside the
    multiple-choice head and the special tokens' embeddings (needs peft); 0: train all weights."""
    lora_alpha: float = 16.0
    """LoRA's changes count lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Dropout of what goes into the adapters."""
    merge_lora: bool = False
    """Save ordinary weights with the adapters merged, not the adapters alone."""


@dataclass
class ValidationOptions:
    """Evaluation: of the validation split, which tells the best checkpoint."""

    eval_before_start: bool = False
    """Evaluate once before training."""
    eval_every: int = 0
    """Evaluate every so many optimizer steps and at the end, whatever the epochs; 0: after each
    epoch."""
    valid_batch_size: int = 4
    """Examples a batch in validation."""
    valid_examples: int = 0
    """Evaluate on so many examples, spread evenly over the validation split; 0: on all."""
    patience: int = 0
    """Stop when so many evaluations in a row have not found a lower nll; 0: never."""


@dataclass
class DeviceOptions:
    """Device: where and how it is computed."""

    device: str = "auto"
    """cuda, cuda:1 or cpu; auto takes cuda where there is one."""
    precision: Precision = "auto"
    """Autocast to bf16 or fp16 over float32 weights, or fp32; auto takes bf16 where the hardware
    multiplies it."""
    layout: Layout = "shared"
    """shared: what the candidates of an example share is computed once, and nothing is padded;
    padded: every candidate by itself, for comparison."""
    gradient_checkpointing: bool = False
    """Keep less for the backward pass and compute it again: less memory, a third more time."""
    compile: bool = False
    """Compile the model's blocks with torch.compile; the first step then takes some ten seconds."""
    store_on_device: bool = False
    """Keep the tokenised dialogues in the GPU's memory and make batches there, where the CPU cannot
    keep up (--layout shared); on a CPU it changes nothing."""
    deterministic: bool = False
    """On a GPU, take kernels that make the same bits every time, which are slower: the run can be
    repeated, and goes on as if it had never stopped; on a CPU that is always so."""
    fsdp: bool = False
    """Shard weights, gradients and optimizer state over the processes that torchrun started
    (FSDP2); by default each has all of them (DDP)."""


@dataclass
class RunOptions:
    """Run folder: what is written where, and which run goes on."""

    output: str = ""
    """The run folder; by default runs/<time>_<host>_<model>."""
    save_every: int = 0
    """Optimizer steps between two checkpoints, the most that a kill can lose; 0: save only after
    each evaluation."""
    log_every: int = 10
    """Optimizer steps between two records in metrics.jsonl."""
    report_to: tuple[ReportTo, ...] = ("tensorboard",)
    """Where else they are recorded: tensorboard's events in the run folder; wandb or trackio, whose
    project WANDB_PROJECT or TRACKIO_PROJECT names (by default convai-fast) and where a run that
    goes on continues; none: nowhere."""
    resume: str = ""
    """Continue the run in this folder from its last checkpoint, with its own options: only
    n_epochs, max_steps, patience, eval_every, save_every, log_every, report_to, dataset_path,
    dataset_cache and device may be given anew; a reader that is a function must be, since it is
    code. auto: the run in --output, or else the newest run under runs/ that is unfinished, not
    running, and has the options given here; a new run where there is none."""


@dataclass
class TrainOptions(  # the fields of the last come first
    RunOptions,
    DeviceOptions,
    ValidationOptions,
    LoraOptions,
    StepOptions,
    ModelOptions,
    ExampleOptions,
    DataOptions,
):
    """Fine-tune a model of two heads on dialogues.

    Makes a run folder with options.yaml, metrics.jsonl, TensorBoard events, and the last and the
    best checkpoint, which `convai-fast interact` and transformers open.
    """

    def __post_init__(self) -> None:
        """Take a single name in `report_to`, too, for a tuple of one."""
        super().__post_init__()
        self.report_to = cast(tuple[ReportTo, ...], texts(self.report_to))

    def check(self) -> None:
        """Raise UserError at the first option that makes no sense, or that needs a package."""
        for place in self.report_to:
            if place not in get_args(ReportTo):
                raise UserError(
                    f"`report_to` must be of {', '.join(get_args(ReportTo))}, not {place}"
                )
            if place != "none":
                require(place, f"recording a run in {place}")
        if self.lora_r:
            require("peft", "`lora_r`")
        at_least = {
            "num_candidates": 1,
            "max_history": 0,
            "train_batch_size": 1,
            "train_batch_tokens": 0,
            "valid_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "warmup_steps": 0,
            "n_epochs": 0,
            "max_steps": 0,
            "personality_permutations": 1,
            "valid_examples": 0,
            "patience": 0,
            "eval_every": 0,
            "save_every": 0,
            "log_every": 1,
            "lr": 0,
            "weight_decay": 0,
            "adam_beta2": 0,
            "lm_coef": 0,
            "mc_coef": 0,
            "max_norm": 0,
            "lora_r": 0,
            "lora_dropout": 0,
            "seed": 0,
        }
        at_most = {
            "num_candidates": 10_000,
            "personality_permutations": 1_000,
            "seed": 2**63 - 1,
        }
        check_at_least(self, at_least)
        for name in at_least:
            # The compiled operators count in 32 bits.
            value, most = getattr(self, name), at_most.get(name, 2**31 - 1)
            if isinstance(value, int) and value > most:
                raise UserError(f"`{name}` must be at most {most}, not {value}")
        if not self.adam_beta2 < 1:
            raise UserError(f"`adam_beta2` must be below 1, not {self.adam_beta2}")
        if not self.lora_dropout < 1:
            raise UserError(f"`lora_dropout` must be below 1, not {self.lora_dropout}")
        if not self.lora_alpha > 0:
            raise UserError(f"`lora_alpha` must be above 0, not {self.lora_alpha}")
        if self.merge_lora and not self.lora_r:
            raise UserError("`merge_lora` without `lora_r`: there is nothing to merge")
        for name in ("lora_alpha", "lora_dropout"):
            if not self.lora_r and getattr(self, name) != getattr(TrainOptions, name):
                raise UserError(f"`{name}` without `lora_r`: give LoRA's rank too, such as 16")
        if self.lora_r and self.from_scratch:
            raise UserError("`lora_r` adapts trained weights: leave out `from_scratch`")
        if self.store_on_device and self.layout != "shared":
            raise UserError("`store_on_device` makes batches in the `layout` shared alone")
        if self.fsdp and self.lora_r:
            raise UserError(
                "`fsdp` and `lora_r` do not go together: what LoRA trains is small on every device"
            )
        if self.lm_coef == self.mc_coef == 0:
            raise UserError("`lm_coef` and `mc_coef` are both 0: there is nothing to learn")
