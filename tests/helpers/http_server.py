"""A server in a thread of this process."""

import threading
import time
from contextlib import contextmanager

import uvicorn

from convai_fast.serving.app import make_app


@contextmanager
def serving(engine, settings):
    """The address of a server of `engine`, until the block ends."""
    config = uvicorn.Config(make_app(engine, settings), port=0, log_level="critical")
    server = uvicorn.Server(config)
    started = threading.Event()
    startup = server.startup

    async def told(sockets=None):
        await startup(sockets)
        started.set()

    server.startup = told
    thread = threading.Thread(target=server.run)
    thread.start()
    assert started.wait(30)
    try:
        (listener,) = server.servers[0].sockets
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_until(is_so):
    for _ in range(2000):
        if is_so():
            return
        time.sleep(0.005)
    raise AssertionError("it does not come")
