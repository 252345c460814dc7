"""Build, test and measure on a GPU, and write what came out into one file.

python -m benchmarks.gpu                        ten minutes; benchmarks/results/<GPU>.json
python -m benchmarks.gpu --only build tests     some of the parts (benchmarks/gpu/parts.py)
python -m benchmarks.gpu --device cpu --smoke   tiny shapes, to see that the script itself runs

It needs torch, and a toolkit of torch's CUDA to build with; what lacks a package is named as not
run. The file is written after each part. Run again on the same machine and commit, the script
replaces the parts that it runs.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.notes import Notes
from benchmarks.gpu.parts import PARTS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
LOG_LINES = 40  # of a part that failed


def main() -> None:
    """Run the parts; exit with 1 where one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes; figures mean nothing")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    parser.add_argument("--output", type=Path, help="the file, if not that of the GPU's name")
    options = parser.parse_args()
    # By another process, lest this one hold the GPU meanwhile.
    command = [sys.executable, "-m", "benchmarks.gpu.machine", options.device]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if asked.returncode:
        reason = asked.stderr.strip().splitlines()[-1]
        parser.error(f"{reason} (--device cpu --smoke tries the script without a GPU)")
    facts = json.loads(asked.stdout)
    name = re.sub(r"\W+", "-", facts["device"]).strip("-") + ("-smoke" if options.smoke else "")
    path = options.output or RESULTS / f"{name}.json"
    results = before(path, facts)
    deadline = time.monotonic() + 60 * options.minutes
    for part in options.only:
        print(f"{part} …", flush=True)
        result = run_part(part, options.device, options.smoke, deadline)
        results["parts"][part] = result
        write(path, results)
        print(describe(result), flush=True)
    print(f"written: {path}")
    sys.exit(any(results["parts"][part]["status"] == "failed" for part in options.only))


def before(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What the file holds of the same machine and commit, to be added to."""
    if path.is_file():
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["machine"] == facts:
            return results
    return {"machine": facts, "parts": {}}


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the file whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.rename(path)


def run_part(name: str, device: str, smoke: bool, deadline: float) -> dict[str, Any]:
    """Run a part in a process of its own, for as long as it may; what became of it."""
    started = time.monotonic()
    seconds = min(PARTS[name].seconds, deadline - started)
    if seconds < 5:
        return {"status": "not run", "not_run": {name: "no time was left"}}
    with tempfile.TemporaryDirectory() as folder:
        notes, log = Notes(Path(folder) / "notes"), Path(folder) / "log"
        command = [sys.executable, "-m", "benchmarks.gpu.part", name, str(notes.path), device]
        command += [str(seconds), "smoke" if smoke else "full"]
        with open(log, "wb") as output:
            # A session of its own, so that those that the part starts can be ended with it.
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "CONVAI_FAST_BACKEND": "native"},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        result: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **notes.read()}
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    result["seconds"] = round(time.monotonic() - started, 1)
    if code is None:
        result["status"] = f"cut short after {seconds:.0f} s"
    elif code or "failed" in result:
        result["status"] = "failed"
    else:
        result["status"] = "done" if "figures" in result else "not run"
    if result["status"] not in ("done", "not run"):
        result["log"] = lines[-LOG_LINES:]
    return result


def describe(result: dict[str, Any]) -> str:
    """A part's result, to be read while the next one runs."""
    lines = [f"  {result['status']}, {result.get('seconds', 0)} s"]
    for kind in ("failed", "not_run"):
        for name, why in result.get(kind, {}).items():
            lines.append(f"  {kind.replace('_', ' ')}: {name}: {why}")
    for name, values in result.get("figures", {}).items():
        lines.append(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    if result["status"] == "failed" and "failed" not in result:
        lines += [f"  | {line}" for line in result["log"][-5:]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
