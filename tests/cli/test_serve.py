"""The command `serve`, as a process."""

import json
import signal
import socket
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient

from convai_fast.cli import serve as serve_command
from convai_fast.cli.main import main
from tests.helpers.command_line import start_server

BODY = {"messages": [{"role": "user", "content": "hello"}], "seed": 1}


@pytest.fixture
def serve(model):
    """A function that starts a server; it gives the process and the address."""
    processes = []

    def serve(*options, **environment):
        process, url = start_server("--model", model, *options, **environment)
        processes.append(process)
        return process, url

    yield serve
    for process in processes:
        process.kill()
        process.communicate()


def test_what_is_under_way_at_a_sigterm_is_answered_and_what_comes_is_refused(serve):
    process, url = serve("--served_name", "mine", "--max_length", "50", "--min_length", "50")
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "mine"
    lines = []
    begun = threading.Event()

    def ask():
        body = BODY | {"stream": True, "model": "mine"}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                if len(lines) > 3:
                    begun.set()

    thread = threading.Thread(target=ask)
    thread.start()
    assert begun.wait(30)
    process.send_signal(signal.SIGTERM)
    thread.join(60)
    *_, ending, last = (line.removeprefix("data: ") for line in lines if line)
    assert last == "[DONE]"
    assert json.loads(ending)["choices"][0]["finish_reason"] == "length"
    assert process.wait(30) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    assert "Traceback" not in process.stderr.read()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_the_key_of_the_environment_is_asked_for(model, monkeypatch):
    servers = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: servers.append(server))
    monkeypatch.setenv("CONVAI_FAST_API_KEY", "s3cret")
    assert main(["serve", "--model", model, "--port", "0"]) == 0
    (server,) = servers
    with TestClient(server.config.app, base_url="http://127.0.0.1") as client:
        assert client.post("/v1/chat/completions", json=BODY).status_code == 401
        headers = {"authorization": "Bearer s3cret"}
        answer = client.post("/v1/chat/completions", json=BODY, headers=headers)
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"]


def test_who_never_sends_all_of_a_request_does_not_keep_it_from_ending(model, monkeypatch):
    servers = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: servers.append(server))
    for timeout in ("2.5", "0", "inf"):
        assert main(["serve", "--model", model, "--port", "0", "--timeout", timeout]) == 0
    assert [server.config.timeout_graceful_shutdown for server in servers] == [4, None, None]


def test_an_address_of_version_6_is_told_as_a_browser_takes_it(model, monkeypatch, capsys):
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)
    listener = SimpleNamespace(getsockname=lambda: ("::1", 8000, 0, 0))
    monkeypatch.setattr(serve_command, "_listening", lambda host, port: nullcontext(listener))
    assert main(["serve", "--model", model, "--host", "::1"]) == 0
    assert "answers at http://[::1]:8000/v1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--port", "70000"], "port must be 0-65535"),
        (["--max_history", "-1"], "--max_history must be at least 0"),
    ],
)
def test_a_number_that_cannot_be_is_one_sentence(model, capsys, options, says):
    assert main(["serve", "--model", model, *options]) == 2
    assert says in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_sentence(model, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model", model, "--port", port]) == 2
    error = capsys.readouterr().err
    assert f"cannot listen at 127.0.0.1, port {port}" in error and "choose another --port" in error
