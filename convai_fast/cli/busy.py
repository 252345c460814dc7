"""Whether other processes take the cores that this one means to compute on."""

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")
_LEAST_SECONDS = 0.5  # in which it can be told


class OtherProcesses:
    """What processes but this one compute from now on; Linux tells, elsewhere there are none."""

    def __init__(self) -> None:
        self._since, self._before = time.monotonic(), self._seconds()

    def _seconds(self) -> float | None:
        """CPU time that they have taken, all cores together; None where it is not told."""
        try:
            user, nice, system, _, _, irq, softirq, *_ = map(
                int, _STAT.read_text(encoding="ascii").splitlines()[0].split()[1:]
            )
        except (OSError, ValueError):
            return None
        own = os.times()
        all_seconds = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        return all_seconds - own.user - own.system - own.children_user - own.children_system

    def warning(self, num_threads: int) -> str:
        """A sentence where they leave too few cores for so many threads; else empty."""
        seconds, now = time.monotonic() - self._since, self._seconds()
        if self._before is None or now is None or seconds < _LEAST_SECONDS:
            return ""
        taken, num_cores = (now - self._before) / seconds, os.cpu_count() or 1
        left = num_cores - taken
        if num_threads == 1 or left > num_threads - 0.5:
            return ""
        return (
            f"other processes take {taken:.1f} of {num_cores} cores, and {num_threads} threads wait"
            f" for one another: --threads {max(1, round(left))} is often several times faster"
        )
