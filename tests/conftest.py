"""What every process that runs tests loads first: PyTorch, then lance_mlx, which finds MLX an OpenBLAS."""

import gc
import signal
from collections.abc import Iterator

import pytest

# In this order: PyTorch would multiply with an OpenBLAS that is there before it, and no longer bit for bit as when
# upstream was captured.
import torch  # noqa: F401
from hypothesis import HealthCheck, settings

import lance_mlx  # noqa: F401
from lance_mlx.backend import allocator

# A script's background job ignores interrupts, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine may take any time over an example.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--all`: also what is marked exhaustive."""
    parser.addoption("--all", action="store_true", help="run what is marked exhaustive too (make test-all)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked exhaustive, visibly, unless all is asked for."""
    if not config.getoption("--all"):
        left_out = pytest.mark.skip(reason="exhaustive: make test-all runs it")
        for item in items:
            if item.get_closest_marker("exhaustive"):
                item.add_marker(left_out)


@pytest.fixture(autouse=True, scope="module")
def give_back() -> Iterator[None]:
    """Return to the system what a file of tests has freed: a process that runs many of them would keep it all."""
    yield
    gc.collect()
    allocator.release()
