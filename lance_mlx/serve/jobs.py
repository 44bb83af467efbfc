"""One request on its way through the queue, as the thread of the model and the clients' event loop both see it."""

import asyncio
import secrets
import shutil
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from lance_mlx.api import Answer
from lance_mlx.requests.request import Question, Request
from lance_mlx.serve.errors import ApiError


class State(StrEnum):
    """Where a job stands; OpenAI's names, of which `cancelled` is never shown as a video's."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Progress:
    """What is being done, and how much of it is done.

    Attributes:
        doing: "loading", "reading", "denoising", "decoding" or "answering".
        done, total: in tensors, steps, frames or tokens; a total of 0 is not known.
    """

    doing: str
    done: int = 0
    total: int = 0

    def __str__(self) -> str:
        return f"{self.doing} {self.done} of {self.total}" if self.total else self.doing


class Cancelled(Exception):
    """Nobody waits for the job any more."""


class Job:
    """Something to draw, or a question to answer.

    The thread of the model writes the attributes and then calls `tell`; `changed` wakes whoever follows.

    Attributes:
        work: one request for each output, or a question.
        folder: holds the files that were given, and those that are made.
        previews: how many images are wanted on the way.
        preview: the latest of them, the number of it from 1 and a PNG's bytes.
        outputs: files that are made.
        pieces: text of the answer as it comes.
    """

    def __init__(self, work: tuple[Request, ...] | Question, folder: Path, previews: int = 0) -> None:
        self.id = f"video_{secrets.token_hex(16)}"
        self.work = work
        self.folder = folder
        self.previews = previews
        self.created = time.time()
        self.finished: float | None = None
        self.state = State.QUEUED
        self.progress = Progress("waiting")
        self.preview: tuple[int, bytes] | None = None
        self.outputs: list[Path] = []
        self.pieces: list[str] = []
        self.answer: Answer | None = None
        self.error: ApiError | None = None
        self.is_cancelled = False
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in (State.COMPLETED, State.FAILED, State.CANCELLED)

    def end(self, state: State, error: ApiError | None = None) -> None:
        """Note that the job is over; called once."""
        self.error, self.finished = error, time.time()
        self.state = state
        self.tell()

    def tell(self) -> None:
        """Wake those who follow, from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, timeout: float) -> bool:
        """Wait for the next change, in the event loop; whether one came in `timeout` seconds."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def clear(self) -> None:
        """Remove the job's files."""
        shutil.rmtree(self.folder, ignore_errors=True)
