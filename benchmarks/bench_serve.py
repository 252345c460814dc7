"""A server under the load of 64 clients beside the same requests in bulk.

python -m pytest benchmarks/bench_serve.py --benchmark-only

Server, clients and the engine in bulk have a process each; the clients' is on the same cores.
"""

import asyncio
import re
import statistics
import subprocess
import sys
import time

import httpx
import pytest

from benchmarks import shapes
from benchmarks.timing import record
from benchmarks.workers import Work, Worker, pairwise, take_turns
from convai_fast._native import keep_freed_memory
from convai_fast.generation.engine import GenerationEngine

ROUNDS, NUM_CLIENTS, NUM_REQUESTS = 3, 64, 192
SHAPE = shapes.GenerateShape(NUM_REQUESTS)
LIMIT = httpx.Limits(max_connections=None)


def make_bulk(weights: str) -> Work:
    """All requests through one engine."""
    model, tokenizer = shapes.model_and_tokenizer("gpt2")
    _, requests = shapes.generate_requests(SHAPE)
    keep_freed_memory()
    engine = GenerationEngine(model, tokenizer, max_batch_size=NUM_CLIENTS, weights=weights)

    def generate(turn: int):
        engine.clear_prefixes()
        return [reply.token_ids for (reply,) in engine.generate(requests)]

    return generate


def make_clients(url: str) -> Work:
    """As many clients, each of which asks again when it is answered."""
    _, requests = shapes.generate_requests(SHAPE)

    def body(number: int, turn: int, **more: object) -> dict[str, object]:
        # No two prompts begin alike, in any round.
        ids = [1000 + turn, 1000 + number, *requests[number].input_ids[2:]]
        length = SHAPE.new_tokens
        return {"input_ids": ids, "max_tokens": length, "min_length": length, "seed": 1} | more

    async def ask_all(turn: int) -> tuple[int, list[float]]:
        left, firsts = iter(range(NUM_REQUESTS)), []
        async with httpx.AsyncClient(timeout=None, limits=LIMIT) as client:

            async def ask() -> int:
                tokens = 0
                for number in left:
                    asked = client.post(f"{url}/v1/completions", json=body(number, turn))
                    tokens += (await asked).json()["usage"]["completion_tokens"]
                return tokens

            async def look() -> None:
                """How soon one more gets its first token."""
                await asyncio.sleep(1)
                for number in range(3):
                    started = time.perf_counter()
                    more = {"stream": True, "input_ids": [2000 + turn, number, *range(1000, 1126)]}
                    asked = client.stream(
                        "POST", f"{url}/v1/completions", json=body(0, turn) | more
                    )
                    async with asked as answer:
                        await anext(answer.aiter_lines())
                        firsts.append(time.perf_counter() - started)

            looking = asyncio.ensure_future(look())
            tokens = sum(await asyncio.gather(*(ask() for _ in range(NUM_CLIENTS))))
            looking.cancel()
        return tokens, firsts

    return lambda turn: asyncio.run(ask_all(turn))


@pytest.mark.parametrize("weights", ["bfloat16"])
def test_serve(benchmark, weights, say, tmp_path):
    model, tokenizer = shapes.model_and_tokenizer("gpt2")
    model.save_pretrained(tmp_path / "model", tokenizer)
    command = ["serve", "--model", str(tmp_path / "model"), "--port", "0", "--weights", weights]
    options = ["--batch_size", str(NUM_CLIENTS + 1), "--timeout", "0"]
    server = subprocess.Popen(
        [sys.executable, "-m", "convai_fast", *command, *options], stdout=subprocess.PIPE, text=True
    )
    try:
        url = re.search(r"http://[\d.]+:\d+", server.stdout.readline())[0]
        workers = {"bulk": Worker(make_bulk, weights), "served": Worker(make_clients, url)}
        turns = benchmark.pedantic(lambda: take_turns(workers, ROUNDS), rounds=1)
    finally:
        server.terminate()
        server.wait()
    median, least, most = pairwise(turns, "bulk", "served")
    firsts = [first for turn in turns["served"] for first in turn.result[1]]
    tokens = NUM_REQUESTS * SHAPE.new_tokens
    speed = tokens / statistics.median(turn.seconds for turn in turns["bulk"])
    say(f"\n{SHAPE}, {weights}, {NUM_CLIENTS} clients")
    say(f"  bulk {speed:,.0f} tokens/s; served {median:.2f} x as long ({least:.2f}-{most:.2f})")
    say(f"  one more gets its first token after {statistics.median(firsts):.2f} s")
    figures = {"bulk tok/s": round(speed), "ratio": round(median, 3)}
    record("serve", f"{SHAPE}, {weights}", figures | {"first": round(statistics.median(firsts), 3)})
