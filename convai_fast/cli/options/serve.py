"""The options of `convai-fast serve`."""

from dataclasses import dataclass

from convai_fast.cli.options.common import DeviceOption, ReplyOptions
from convai_fast.options import Weights


@dataclass
class ServerOptions:
    """Server: where it listens, and for whom."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines ask, too."""
    port: int = 8000
    """Port to listen at; 0: any that is free."""
    api_key: str = ""
    """Answer only who sends this key, as OpenAI's clients do (the variable CONVAI_FAST_API_KEY
    keeps it out of the list of processes)."""
    allow_origin: tuple[str, ...] = ()
    """Origins of web pages whose scripts may ask (CORS), such as https://example.org."""
    served_name: str = ""
    """Name under which the model is asked for, by default that of its folder."""


@dataclass
class LimitOptions:
    """Limits: what is refused."""

    max_requests: int = 512
    """Requests that are answered or wait at a time, each as often as it draws replies; others get
    the status 429."""
    max_body: int = 262_144
    """Bytes of a request; a larger one gets the status 413."""
    timeout: float = 60.0
    """Seconds that an answer may take before it is the status 504, and before that the body of the
    request (408); 0: as long as they take."""


@dataclass
class ServedModelOptions(DeviceOption):
    """Model: what answers."""

    model: str = ""
    """Folder, run, .tar.gz or Hub id of a fine-tuned model with its tokenizer."""
    weights: Weights = "auto"
    """Number format of the weights; int8 is an approximation. auto: bfloat16 on a GPU, float32 on a
    CPU."""
    batch_size: int = 64
    """Replies that are written at a time."""
    max_history: int | None = None
    """Exchanges of history that the model sees (2 * max_history + 1 turns). By default as in
    training, else 2."""


@dataclass
class ServeOptions(ReplyOptions, LimitOptions, ServerOptions, ServedModelOptions):
    """Answer over HTTP as OpenAI's completions do, and on a page to chat at.

    The system's message is the persona, a sentence a line. Options of replies are what a request
    that does not give them gets.
    """

    def missing(self) -> dict[str, str]:
        """What has to be given yet."""
        return {} if self.model else {"model": "a fine-tuned model (folder, run or Hub id)"}
