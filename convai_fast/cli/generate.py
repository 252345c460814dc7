"""`convai-fast generate`: replies in bulk."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from convai_fast.bulk.answers import Replies
from convai_fast.bulk.dataset import DatasetRequests
from convai_fast.bulk.jsonl import RequestFile, candidates_record, reply_record
from convai_fast.bulk.reply_file import ReplyFile
from convai_fast.bulk.run import BulkRun
from convai_fast.cli.bulk import BulkOptions, exit_on_sigterm
from convai_fast.cli.sampling import SamplingOptions
from convai_fast.data.dataset import check_at_least
from convai_fast.dialogue.encoding import tokenizer_fingerprint
from convai_fast.errors import UserError
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.identified import IdentifiedRequest
from convai_fast.generation.request import Reply, check_ranking, prompt_room
from convai_fast.hardware import resolve_device
from convai_fast.loading import load, model_fingerprint


@dataclass
class GenerateOptions(BulkOptions):
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

    num_return: Annotated[int, tyro.conf.arg(aliases=["--n"])] = 1
    """Replies to each request."""
    logprobs: bool = False
    """Write the log-probability of each token of a reply."""
    token_ids: bool = False
    """Write the token ids of a reply."""
    as_candidates: bool = False
    """Write turns as train reads them: the replies as candidates, the true one last (--data). Their
    history is that which --max_history lets the model see."""
    batch_size: int = 64
    """Replies that are written at a time, at most; on a CPU they do not depend on it."""
    weights: Literal["float32", "bfloat16", "int8"] = "float32"
    """Number format of the weights; int8 is an approximation."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(
        default_factory=SamplingOptions
    )

    def checked_output(self) -> Path:
        """See `BulkOptions`."""
        if self.as_candidates and self.input:
            raise UserError("--as_candidates needs true replies: give dialogues with --data")
        if self.as_candidates and (self.token_ids or self.logprobs):
            raise UserError("--as_candidates writes texts alone: leave out token ids and logprobs")
        check_at_least(self, {"num_return": 1, "batch_size": 1})
        return super().checked_output()


def run(options: GenerateOptions) -> None:
    """Answer what is not answered yet, then put the file of replies in its place."""
    options.check_given()
    options.recall()
    output = options.checked_output()
    params = replace(options.sampling, n=options.num_return, logprobs=options.logprobs)
    source: RequestFile | DatasetRequests
    if options.input:
        source = RequestFile(options.input, params)
    else:  # distractors are not read
        source = options.requests_of(replace(options.data, fill_candidates=1), params)
    device = resolve_device(options.device)
    model, tokenizer = load(options.model)
    prompt_room(model.config.n_positions, params)  # too long a reply is no line's fault
    check_ranking(params, model)
    settings = {
        **source.settings,
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "weights": options.weights,
        "token_ids": options.token_ids,
        **({"as_candidates": True} if options.as_candidates else {}),
        **asdict(params),
    }
    engine = GenerationEngine(
        model.to(device), tokenizer, max_batch_size=options.batch_size, weights=options.weights
    )
    record: Callable[[IdentifiedRequest, Sequence[Reply]], dict[str, Any]] = candidates_record
    if not options.as_candidates:
        record = partial(reply_record, with_token_ids=options.token_ids)
    answers = Replies(engine, record)
    with exit_on_sigterm(), ReplyFile(output, settings, overwrite=options.overwrite) as file:
        BulkRun(answers, source, file).run()
