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


@pytest.fixture(autouse=True, scope="module")
def give_back() -> Iterator[None]:
    """Return to the system what a file of tests has freed: a process that runs many of them would keep it all."""
    yield
    gc.collect()
    allocator.release()
