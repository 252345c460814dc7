"""Drawing a token a row: the operator beside transformers' warpers, and one read of the logits.

python -m pytest benchmarks/bench_sample.py --benchmark-only
"""

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from benchmarks import shapes
from benchmarks.timing import compare, record
from convai_fast import ops
from convai_fast.comparison.measure import ratios

WARPERS = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}


@pytest.fixture(scope="module", params=shapes.SAMPLE_SHAPES, ids=str)
def workload(request):
    return request.param, *shapes.sample_logits(request.param)


@pytest.mark.parametrize("filters", shapes.SAMPLE_FILTERS)
def test_sample(benchmark, workload, filters, say):
    shape, name, logits = workload
    values = shapes.SAMPLE_FILTERS[filters]
    temperature = shapes.SAMPLE_TEMPERATURE
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers.extend(WARPERS[key](value) for key, value in values.items())
    seeds, steps = torch.arange(shape.rows), torch.zeros(shape.rows, dtype=torch.int64)

    def sample():
        return ops.sample(logits, temperature=temperature, seeds=seeds, steps=steps, **values)[0]

    ways = {
        "sample": sample,
        "warpers": lambda: torch.multinomial(warpers(None, logits).softmax(-1), 1),
        "sum": lambda: logits.sum(),
        "amax": lambda: logits.amax(),
    }
    kept = warpers(None, logits) > -torch.inf
    # The same work: what is drawn is what the warpers keep.
    assert kept.gather(1, sample()[:, None]).all()
    # The warpers take up to a second a call.
    times = compare(ways, rounds={1: 15, 32: 9}.get(shape.rows, 3))
    # One read of the logits is the floor: whichever reduction is faster.
    times["read"] = min(times["sum"], times["amax"], key=np.median)
    benchmark.pedantic(sample, rounds=5)

    median = {way: float(np.median(seconds)) for way, seconds in times.items()}
    ratio, least, most = ratios(times, "sample", "warpers")
    reads, fewest, greatest = ratios(times, "read", "sample")
    figures = {f"{way}_us": round(seconds * 1e6, 1) for way, seconds in median.items()}
    figures |= {
        "warpers_ratio": round(ratio, 1),
        "warpers_ratio_spread": f"{least:.1f}-{most:.1f}",
        "reads": round(reads, 2),
        "reads_spread": f"{fewest:.2f}-{greatest:.2f}",
        "kept_median": float(kept.sum(-1).float().median()),
    }
    record("sample", f"{name}, {shape}, {filters}", figures)
    say(
        f"\n{shape}, {filters} ({name}; {figures['kept_median']:,.0f} tokens kept): "
        f"{median['sample'] * 1e6:,.0f} us, {median['sample'] / shape.rows * 1e6:.1f} a row\n  "
        f"{ratio:.0f} x the warpers ({figures['warpers_ratio_spread']}); {reads:.1f} reads of the "
        f"logits ({figures['reads_spread']}), floor {median['read'] * 1e6:,.0f} us"
    )
