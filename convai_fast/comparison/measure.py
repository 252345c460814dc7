"""Two ways to do the same work, timed in turn: their ratio holds on a machine that is not quiet."""

import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

_FEWEST, _MOST = 2, 200  # pairs of turns
_PICTURE = "speed.png"


@dataclass(frozen=True)
class Way:
    """One way: `run(turn)` does the work of a turn, which is `amount` units, and waits for it."""

    run: Callable[[int], object]
    amount: float


@dataclass(frozen=True)
class Workload:
    """The same work in two ways, both of which have been warmed up.

    `note` says what is compared, and what either leaves out.
    """

    name: str
    unit: str
    ours: Way
    theirs: Way
    note: str


@dataclass(frozen=True)
class Figures:
    """What was measured of a workload.

    Attributes:
        ours, theirs: units a second, in each pair of turns.
    """

    name: str
    unit: str
    note: str
    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> tuple[float, float, float]:
        """Median, smallest and largest of how many times ours is as fast, pair by pair."""
        return ratios({"ours": self.theirs, "theirs": self.ours}, "ours", "theirs")

    def __str__(self) -> str:
        theirs, ours = statistics.median(self.theirs), statistics.median(self.ours)
        median, least, most = self.ratio
        row = f"{self.name:<24} {self.unit + '/s':<12} {theirs:>12,.2f} {ours:>12,.2f}"
        return f"{row} {median:>6.1f} x  ({least:.1f}-{most:.1f}, {len(self.ours)} pairs)"

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        median, least, most = self.ratio
        return {
            "workload": self.name,
            "unit": f"{self.unit}/s",
            "transformers": statistics.median(self.theirs),
            "convai_fast": statistics.median(self.ours),
            "ratio": median,
            "least": least,
            "most": most,
            "pairs": {"transformers": self.theirs, "convai_fast": self.ours},
            "note": self.note,
        }


HEADER = f"{'':<37} {'transformers':>12} {'convai_fast':>12} {'ratio':>8}  (least-most, pairs)"


def describe_notes(figures: Sequence[Figures]) -> str:
    """What was compared, to be printed below the rows, each of which is the `str` of its figures
    under `HEADER`."""
    paragraphs = []
    for note in dict.fromkeys(each.note for each in figures):
        names = " and ".join(each.name for each in figures if each.note == note)
        paragraphs.append(textwrap.fill(f"{names}: {note}.", 100, subsequent_indent="  "))
    return "\n" + "\n\n".join(paragraphs)


def ratios(times: dict[str, list[float]], ours: str, other: str) -> tuple[float, float, float]:
    """Median, smallest and largest of other / ours, pair by pair."""
    pairs = [b / a for a, b in zip(times[ours], times[other], strict=True)]
    return statistics.median(pairs), min(pairs), max(pairs)


def measure(workload: Workload, seconds: float) -> Figures:
    """Both ways in turn for about `seconds`, but at least two turns each."""
    started = time.perf_counter()
    ours: list[float] = []
    theirs: list[float] = []
    for turn in count():
        before = time.perf_counter()
        for way, speeds in ((workload.theirs, theirs), (workload.ours, ours)):
            began = time.perf_counter()
            way.run(turn)
            speeds.append(way.amount / (time.perf_counter() - began))
        now = time.perf_counter()
        is_enough = 2 * now - before - started > seconds  # with one more
        if turn + 1 >= _MOST or (is_enough and turn + 1 >= _FEWEST):
            return Figures(workload.name, workload.unit, workload.note, ours, theirs)
    raise AssertionError("unreachable")


def draw(figures: Sequence[Figures], title: str, folder: Path) -> list[Path]:
    """Draw how many times as fast ours is, a bar a workload, into `folder`, which exists."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.6 * len(figures)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    names = [each.name for each in figures]
    medians = [each.ratio[0] for each in figures]
    below = [each.ratio[0] - each.ratio[1] for each in figures]
    above = [each.ratio[2] - each.ratio[0] for each in figures]
    axes.barh(names, medians, xerr=[below, above], height=0.6, capsize=3)
    for row, each in enumerate(figures):
        axes.annotate(
            f"{each.ratio[0]:.1f} x",
            (each.ratio[2], row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.axvline(1, color="gray", linestyle="dashed", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("times as fast as transformers (whiskers: smallest and largest of all pairs)")
    axes.set_title(title)
    path = folder / _PICTURE
    figure.savefig(path)
    return [path]
