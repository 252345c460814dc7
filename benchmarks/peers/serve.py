"""The process of one peer: a request a line on its input, an answer a line on its output.

python -m benchmarks.peers.serve openvino FOLDER int8 2

Nothing but the peer is needed, so that this runs in an environment of the peer's own. With one
thread, its seconds are those of the processor, which others on the machine hardly disturb.
"""

import importlib
import json
import os
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks.peers import Drawing


def main() -> None:
    """Make the peer, say its version or what it lacks, and answer until the input ends."""
    runner, folder, number_format, num_threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what a peer prints is no answer

    def say(**answer: object) -> None:
        answers.write(json.dumps(answer) + "\n")

    try:
        module = importlib.import_module(f"benchmarks.peers.{runner}")
    except ModuleNotFoundError as error:
        say(missing=error.name)
        return
    peer = module.Peer(Path(folder), number_format, int(num_threads))
    clock = time.process_time if num_threads == "1" else time.perf_counter
    say(version=f"{module.Peer.package} {version(module.Peer.package)}")
    for line in sys.stdin:
        prompts, new_tokens, drawing = json.loads(line)
        started = clock()
        replies = peer.generate(prompts, new_tokens, Drawing(**drawing))
        seconds = clock() - started
        peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        say(seconds=seconds, result=[list(map(int, r)) for r in replies], peak_mb=peak_kb / 1e3)


if __name__ == "__main__":
    main()
