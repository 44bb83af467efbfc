"""The measurements of scripts/bench_parity.py run and say something plausible; nothing here is timed."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_parity.py"


@pytest.fixture(scope="module")
def bench():
    # It imports the scripts beside it.
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_comparing_needs_the_two_tensors_and_little_else(bench, dtype):
    size = 32 * bench.MEGABYTE
    found = [*bench.compare_tensors(size, dtype, 1), bench.compare_files(size, dtype, 1)]
    assert len({c.what for c in found}) == 6
    for c in found:
        assert c.seconds > 0 and c.cpu_seconds > 0 and c.held >= c.size
        # A few megabytes of blocks come on top.
        assert 2 <= c.memory < 2.2, c.what


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("measure", ["capture_mlx", "capture_reference"])
def test_a_captured_step_holds_every_module(bench, measure, dtype):
    c = getattr(bench, measure)({}, 4, dtype, 1)
    assert c.width == 64 and c.taps > 50 and c.milliseconds > 0 and c.ratio > 0 and c.cpu_ratio > 0
