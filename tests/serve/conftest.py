"""What the tests of the server share: a server in this process, before the small checkpoint or before a stub."""

import base64
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from lance_mlx import FLOAT32, Variant, load

CHECKPOINT = Path(__file__).parents[2] / "oracles" / "checkpoint-a"


class Server:
    """A running server: its address, its worker, its folder, and an OpenAI client of it."""

    def __init__(self, worker, root: Path, port: int, token: str | None) -> None:
        self.worker, self.root, self.port = worker, root, port
        self.address = f"http://127.0.0.1:{port}"
        self.token = token

    def client(self, **options):
        """An OpenAI client that does not try again by itself."""
        import openai

        given = {"api_key": self.token or "none", "max_retries": 0} | options
        return openai.OpenAI(base_url=f"{self.address}/v1", **given)

    def jobs(self) -> list[Path]:
        """Folders of jobs whose files are still there."""
        return list(self.root.glob("job-*"))

    def settle(self, seconds: float = 20) -> None:
        """Wait until nothing is worked on, waits, or is kept."""
        wait(lambda: self.worker.load == (0, False) and not self.jobs(), seconds)


def wait(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait until a condition holds; fails where it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


@contextmanager
def running(opened: Callable, root: Path, token: str | None = None, waiting: int = 16, idle: float = 600):
    """A server on a free port for as long as the block runs."""
    import uvicorn

    from lance_mlx.serve.app import make_app
    from lance_mlx.serve.worker import Worker

    worker = Worker(opened, waiting, idle)
    app = make_app(worker, root, tuple(Variant), token)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait(lambda: server.started)
    try:
        yield Server(worker, root, port, token)
    finally:
        worker.stop()
        server.should_exit = True
        thread.join(20)
        worker.join(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server before the small checkpoint in float32."""

    def opened(track):
        return load(CHECKPOINT, FLOAT32, track=track)

    with running(opened, tmp_path_factory.mktemp("serve")) as started:
        yield started


@pytest.fixture(scope="session")
def serving() -> Callable:
    """`running`, for servers of a test's own."""
    return running


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """`wait`."""
    return wait


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A PNG of 96x64 pixels."""
    return encoded(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))


def encoded(pixels: np.ndarray) -> bytes:
    """Pixels as a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MP4 of 15 frames of 64x48 pixels."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(30))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(15):
            pixels = np.full((48, 64, 3), 10 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def data_url() -> Callable[[bytes, str], str]:
    """Makes a data: URL."""
    return lambda content, kind="image/png": f"data:{kind};base64,{base64.b64encode(content).decode()}"
