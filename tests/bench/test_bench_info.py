"""How near `lance-mlx info` comes to the time that a request takes, under `pytest tests/bench --benchmark-enable`."""

from pathlib import Path

import pytest

from lance_mlx import BFLOAT16, FLOAT32, Request, Task, Variant, load
from lance_mlx.checkpoint.layouts import find_checkpoint
from lance_mlx.estimate.estimate import sizes_of, work_of
from lance_mlx.estimate.machine import measure, seconds_of

CHECKPOINT = Path(__file__).parents[2] / "oracles" / "checkpoint-a"


@pytest.mark.parametrize("numerics", [BFLOAT16, FLOAT32], ids=lambda numerics: numerics.name)
def test_time_is_near_what_is_measured(benchmark, numerics):
    request = Request(Task.T2I, "a red bird", 256, 256, num_steps=4)
    model = load(CHECKPOINT, numerics)
    model.pipeline(Variant.IMAGE, looks=False)
    benchmark(lambda: model.generate(request).frames)
    if not benchmark.enabled:
        pytest.skip("nothing is timed without --benchmark-enable")
    sizes = sizes_of(find_checkpoint(CHECKPOINT, Variant.IMAGE), looks=False)
    expected = seconds_of(sizes, measure(sizes, numerics), work_of(request, 1, on_cpu=True)).total
    assert 1 / 2 < expected / benchmark.stats.stats.min < 2
