"""`convai-fast serve`: a model behind OpenAI's HTTP interface."""

import math
import os
import socket

from convai_fast.archive import name_of
from convai_fast.cli.options.serve import ServeOptions
from convai_fast.data.trained_with import TrainedWith
from convai_fast.errors import UserError
from convai_fast.extras import require
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.request import prompt_room
from convai_fast.hardware import resolve_device
from convai_fast.loading import layout_for, load
from convai_fast.options import check_at_least
from convai_fast.training.options import TrainOptions

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run(options: ServeOptions) -> None:
    """Load the model, listen, and answer until a signal ends it."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, "serving")
    check_at_least(options, {"port": 0, "max_requests": 1, "max_body": 1, "timeout": 0})
    if options.max_history is not None:
        check_at_least(options, {"max_history": 0})
    with _listening(options.host, options.port) as listener:
        _serve(options, listener)


def _serve(options: ServeOptions, listener: socket.socket) -> None:
    import uvicorn

    from convai_fast.serving.app import Settings, make_app

    trained = TrainedWith.read(options.model)
    max_history = options.max_history
    if max_history is None:
        max_history = trained.max_history if trained else TrainOptions.max_history
    device = resolve_device(options.device)
    model, tokenizer = load(options.model)
    prompt_room(model.config.n_positions, options.sampling, layout_for(tokenizer, model.config))
    engine = GenerationEngine(
        model.to(device), tokenizer, max_batch_size=options.batch_size, weights=options.weights
    )
    key = options.api_key or os.environ.get("CONVAI_FAST_API_KEY", "")
    is_local = options.host in _LOOPBACK
    settings = Settings(
        model=options.served_name or name_of(options.model),
        params=options.sampling,
        max_history=max_history,
        max_requests=options.max_requests,
        max_body_bytes=options.max_body,
        timeout_s=options.timeout,
        api_key=key,
        allow_origins=options.allow_origin,
        only_local=is_local,
    )
    host, port = listener.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(f"{settings.model} answers at http://{address}/v1 (Ctrl-C ends)", flush=True)
    if not is_local and not key:
        print("without --api_key whoever reaches this machine may ask", flush=True)
    # What is under way is answered by then, and who has not sent all of a request is left.
    grace = math.ceil(options.timeout) + 1 if 0 < options.timeout < math.inf else None
    config = uvicorn.Config(
        make_app(engine, settings),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=grace,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"cannot listen at {host}, port {port} ({reason}): choose another --port, or "
            "an address of this machine as --host"
        ) from error
