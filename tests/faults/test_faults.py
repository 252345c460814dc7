"""A small run of what `make faults` does with every call."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and cc")
def test_commands_survive_calls_that_fail_and_power_cuts():
    script = Path(__file__).with_name("faults.py")
    arguments = ["--every", "157", "--kinds", "EIO", "power cut"]
    commands = ["prepare", "generate", "convert", "evaluate"]
    in_memory = {"TMPDIR": "/dev/shm"} if Path("/dev/shm").is_dir() else {}
    process = subprocess.run(
        [sys.executable, script, *commands, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **in_memory},
    )
    assert process.returncode == 0, process.stdout + process.stderr
    for command in commands:
        assert f"{command:<21} power cut  died" in process.stdout
