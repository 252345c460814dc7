"""The tests that are marked `cuda`."""

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.notes import Notes, Setting

ROOT = Path(__file__).parents[2]


def run(notes: Notes, setting: Setting) -> None:
    """Run them, but for files of tests that need a package that is not here."""
    tests = ["tests/ops/test_sample_cuda.py"] if setting.smoke else ["tests"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", *tests]
        command += ["--continue-on-collection-errors", "-p", "no:cacheprovider"]
        subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT)
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
