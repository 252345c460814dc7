"""The options of `convai-fast generate`."""

from dataclasses import dataclass

from convai_fast.cli.options.bulk import BulkOptions
from convai_fast.cli.options.common import ReplyOptions
from convai_fast.options import Weights


@dataclass
class WrittenOptions:
    """Replies: what is written of them."""

    num_return: int = 1
    """Replies to each request."""
    logprobs: bool = False
    """Write the log-probability of each token of a reply."""
    token_ids: bool = False
    """Write the token ids of a reply."""
    as_candidates: bool = False
    """Write turns as train reads them: the replies as candidates, the true one last (--data). Their
    history is that which --max_history lets the model see."""


@dataclass
class WritingOptions:
    """Writing: how replies are computed."""

    weights: Weights = "auto"
    """Number format of the weights; int8 is an approximation. auto: bfloat16 on a GPU, float32 on a
    CPU."""
    batch_size: int = 64
    """Replies that are written at a time, at most; on a CPU they do not depend on it."""


@dataclass
class RayOptions:
    """Ray: many machines, on each as many actors as have room, and in each actor an engine."""

    ray: bool = False
    """Let the actors of a Ray cluster write the replies: of the one at RAY_ADDRESS, or of one on
    this machine, which is started. Replies are the same. --batch_size is that of each actor."""
    ray_actors: int = 0
    """How many actors; 0: as many as the cluster has room for."""
    ray_cpus: int = 1
    """Cores of an actor, and its threads."""
    ray_gpus: float = 0.0
    """GPUs of an actor: 1, or a share of one for several actors; 0: it computes on the CPU."""


@dataclass
class GenerateOptions(RayOptions, WritingOptions, ReplyOptions, WrittenOptions, BulkOptions):
    """Write replies in bulk: to the requests of a JSONL file, or to every turn of a dataset.

    A request is a line such as {"id": "a7", "persona": ["i like tea ."], "history": ["hello !"]},
    or {"messages": [{"role": "user", "content": "hello !"}]}, or {"prompt": "hello !"}, or a line
    of an OpenAI batch file. Any sampling option below may stand in it, as may "n" and "logprobs",
    also under the names of other engines (max_tokens), and overrides the command's. Persona and
    history may be lists of lists of token ids, or "input_ids" and "token_type_ids" stand for both.

    The replies are lines in the order of the requests, {"id": "a7", "replies": [{"text": …,
    "finish_reason": …}]}. Until all are there they are kept in OUTPUT.partial, from which the same
    command continues after an interruption; lines that cannot be answered are listed in
    OUTPUT.errors.jsonl.
    """
