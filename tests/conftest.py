"""What every process that runs tests loads first: PyTorch, then lance_mlx, which finds MLX an OpenBLAS."""

import gc
import shutil
import signal
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

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


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage --hide-scrollbars
    --disable-background-networking --disable-component-update --disable-sync""".split()


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


@pytest.fixture
def wide_video(tmp_path: Path) -> Callable[[int, int, int], Path]:
    """Writes wide.mp4, one black frame of a width and a height in pixels that are so many times wider than high."""
    import av
    import numpy as np

    def write(width: int, height: int, aspect: int) -> Path:
        with av.open(str(tmp_path / "wide.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=12)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.sample_aspect_ratio = Fraction(aspect)
            black = np.zeros((height, width, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(black, format="rgb24")))
            container.mux(stream.encode(None))
        return tmp_path / "wide.mp4"

    return write


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """Debian's Chromium without a window, with a profile of its own; one for the tests of a file."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("there is no Chromium with its driver; on Debian: apt install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser: pip install '.[test]'")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def resize(browser) -> Callable[[tuple[int, int], str], None]:
    """Gives the browser's page a size in pixels and a colour scheme."""

    def resized(size: tuple[int, int], scheme: str) -> None:
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})

    return resized
