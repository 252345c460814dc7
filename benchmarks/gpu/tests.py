"""The tests that are marked `cuda`."""

import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.notes import Notes, Setting

ROOT = Path(__file__).parents[2]
WRITING_SECONDS = 10


def run(notes: Notes, setting: Setting) -> None:
    """Run them, but for files of tests that need a package that is not here."""
    tests = ["tests/ops/test_sample_cuda.py"] if setting.smoke else ["tests"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", *tests]
        command += ["--continue-on-collection-errors", "-p", "no:cacheprovider"]
        command += ["-n", "4"] if find_spec("xdist") and setting.is_gpu else []
        process = subprocess.Popen([*command, f"--junitxml={report}"], cwd=ROOT)
        try:
            process.wait(setting.seconds_left - WRITING_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # upon which it still writes the report
            process.wait()
            notes.not_run("the tests after these", "no time was left")
        suite = ElementTree.parse(report)
    counts = {"passed": 0, "skipped": 0}
    for case in suite.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}".strip(":")
        if (error := case.find("error")) is not None and "collection" in error.get("message", ""):
            notes.not_run(name, (error.text or "").strip().splitlines()[-1])
        elif (bad := error if error is not None else case.find("failure")) is not None:
            notes.fail(name, (bad.get("message") or "")[:300])
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    notes.figure("tests", **counts)
