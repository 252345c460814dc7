"""Pictures of an evaluation."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, ScalarFormatter

from convai_fast.evaluation.evaluate import ExampleResult, measured, perplexity

_MOST_TURNS = 30


def draw(examples: Sequence[ExampleResult], folder: Path) -> list[Path]:
    """Draw what was measured into `folder`, which exists, as PNG files; returns them.

    `ranks.png`: how often the true reply had which place among its candidates.
    `perplexity_by_turn.png`: of a token of the true reply, and of a word, turn by turn.
    `reply_lengths.png`: words in the replies that were written and in the true ones.
    """
    first = examples[0]
    pictures: dict[str, Callable[[Sequence[ExampleResult], Axes], None]] = {}
    if first.rank is not None:
        pictures["ranks"] = _draw_ranks
    if first.nll is not None or first.word_nll is not None:
        pictures["perplexity_by_turn"] = _draw_perplexity
    if first.reply is not None:
        pictures["reply_lengths"] = _draw_lengths
    paths = []
    for name, draw_into in pictures.items():
        figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw_into(examples, axes)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1])
    return paths


def _draw_ranks(examples: Sequence[ExampleResult], axes: Axes) -> None:
    counts = Counter(example.rank for example in examples)
    most = max(measured(example.num_candidates for example in examples))
    places = np.arange(1, most + 1)
    axes.bar(places, [100 * counts[int(place)] / len(examples) for place in places])
    axes.axhline(100 / most, color="gray", linestyle="dashed", linewidth=1, label="chance")
    axes.set_xticks(places if most <= 20 else np.arange(0, most + 1, -(-most // 20)))
    axes.set_title("Place of the true reply among its candidates")
    axes.set_xlabel("rank (1: the multiple-choice head picks it)")
    axes.set_ylabel("% of examples")
    axes.legend(frameon=False)


def _draw_perplexity(examples: Sequence[ExampleResult], axes: Axes) -> None:
    turns = sorted({example.turn for example in examples})[:_MOST_TURNS]
    by_turn = [[example for example in examples if example.turn == turn] for turn in turns]
    if examples[0].nll is not None:
        values = [
            perplexity(
                sum(measured(e.nll for e in part)), sum(measured(e.num_tokens for e in part))
            )
            for part in by_turn
        ]
        axes.plot(turns, values, marker="o", label="of a token")
    if examples[0].word_nll is not None:
        values = [
            perplexity(
                sum(measured(e.word_nll for e in part)), sum(measured(e.num_words for e in part))
            )
            for part in by_turn
        ]
        axes.plot(turns, values, marker="s", label="of a word")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_xlim(turns[0] - 0.5, turns[-1] + 0.5)
    _label_whole_numbers(axes)
    counts = [len(part) for part in by_turn]
    of = f"{counts[0]:,}" if len(set(counts)) == 1 else f"{min(counts):,} to {max(counts):,}"
    axes.set_title("Perplexity of the true reply")
    axes.set_xlabel(f"turn of the dialogue, from 0 ({of} examples each)")
    axes.set_ylabel("perplexity")
    axes.legend(frameon=False)


def _draw_lengths(examples: Sequence[ExampleResult], axes: Axes) -> None:
    written = [len(reply.split()) for reply in measured(example.reply for example in examples)]
    true = [len(example.expected.split()) for example in examples]
    longest = max(*written, *true)
    step = max(1, -(-longest // 40))
    edges = np.arange(0, longest + step + 1, step) - 0.5
    axes.hist([written, true], bins=edges.tolist(), label=["written by the model", "true replies"])
    _label_whole_numbers(axes)
    axes.set_title("Length of replies")
    axes.set_xlabel("words")
    axes.set_ylabel("replies")
    axes.legend(frameon=False)


def _label_whole_numbers(axes: Axes) -> None:
    locator = axes.xaxis.get_major_locator()
    assert isinstance(locator, MaxNLocator)  # as by default
    locator.set_params(integer=True, min_n_ticks=1)
