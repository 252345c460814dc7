"""Pictures of an evaluation."""

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from convai_fast.evaluation.evaluate import ExampleResult
from convai_fast.evaluation.plots import _draw_perplexity


def picture(turns):
    axes = Figure().add_subplot()
    examples = [
        ExampleResult(f"valid/0/{t}", t, "yes", nll=4.0 * (t + 1), num_tokens=2) for t in turns
    ]
    _draw_perplexity(examples, axes)
    low, high = axes.get_xlim()
    return axes, [tick for tick in axes.get_xticks() if low <= tick <= high]


@pytest.mark.parametrize("turns", [[0] * 5, [0, 0, 1, 2]])
def test_perplexity_has_whole_turns_a_log_axis_and_the_number_of_examples(turns):
    axes, ticks = picture(turns)
    assert ticks == sorted(set(turns))
    assert axes.get_yscale() == "log"
    of = "5" if len(set(turns)) == 1 else "1 to 2"
    assert axes.get_xlabel() == f"turn of the dialogue, from 0 ({of} examples each)"
