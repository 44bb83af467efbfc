"""The one thread that holds the model: it takes jobs from a queue, one at a time, and lets an idle model go."""

import io
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from PIL import Image

from lance_mlx.api import LanceModel
from lance_mlx.errors import LanceError
from lance_mlx.model.vae import num_decoded_frames
from lance_mlx.requests.request import Question, Request
from lance_mlx.requests.visuals import PreparedVisual, prepare_visuals, sized_by_source
from lance_mlx.sampling.batch import batches
from lance_mlx.sampling.flow import Step
from lance_mlx.sampling.preview import clean_estimate, preview
from lance_mlx.serve.errors import ApiError
from lance_mlx.serve.jobs import Cancelled, Job, Progress, State

LOG = logging.getLogger("lance_mlx.serve")
Item = TypeVar("Item")


class Worker:
    """A queue of jobs before a model; MLX's arrays belong to one thread, so everything is made in this one.

    Args:
        load: opens the model, given as `track` what tracks the reading of its tensors.
        waiting: most jobs in the queue.
        idle_seconds: after so long without a job the model is let go, and loaded again for the next one.
        as_upstream: take the stored pixels of visuals in every request.
    """

    def __init__(
        self, load: Callable[..., LanceModel], waiting: int, idle_seconds: float, as_upstream: bool = False
    ) -> None:
        self.model = load(track=self._track_loading)
        self._limit = waiting
        self._idle_seconds = idle_seconds
        self._as_upstream = as_upstream
        self._queue: list[Job] = []
        self._job: Job | None = None
        self._is_stopping = False
        self._ready = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more jobs and end those that there are; returns at once."""
        with self._ready:
            self._is_stopping = True
            jobs = [*self._queue, *filter(None, [self._job])]
            self._ready.notify()
        for job in jobs:
            self.cancel(job)

    def join(self, timeout: float) -> bool:
        """Wait for the thread to end after `stop`; whether it did."""
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def load(self) -> tuple[int, bool]:
        """How many jobs wait, and whether one is being worked on."""
        with self._ready:
            return len(self._queue), self._job is not None

    def submit(self, job: Job) -> Job:
        """Put a job into the queue; raises ApiError where that is full."""
        with self._ready:
            if self._is_stopping:
                raise ApiError(503, "the server is shutting down")
            if len(self._queue) >= self._limit:
                raise ApiError(429, f"the queue is full: {self._limit} requests wait; try again later", "queue_full")
            self._queue.append(job)
            self._ready.notify()
        return job

    def before(self, job: Job) -> int:
        """How many jobs come before a waiting one, the one that is worked on included."""
        with self._ready:
            place = self._queue.index(job) if job in self._queue else 0
            return place + (self._job is not None)

    def cancel(self, job: Job) -> None:
        """End a job: at once where it waits, after the step in progress where it runs."""
        job.is_cancelled = True
        with self._ready:
            waits = job in self._queue
            if waits:
                self._queue.remove(job)
            behind = list(self._queue)
        if waits:
            job.end(State.CANCELLED, ApiError(499, "the request was cancelled", "cancelled"))
        else:
            job.tell()
        for other in behind if waits else ():
            other.tell()

    def _work(self) -> None:
        while self._take():
            job = self._job
            try:
                self._run(job)
            except Cancelled:
                job.end(State.CANCELLED, ApiError(499, "the request was cancelled", "cancelled"))
            except ApiError as error:
                job.end(State.FAILED, error)
            except LanceError as error:
                job.end(State.FAILED, ApiError(500, str(error).replace(f"{job.folder}/", "")))
            except Exception as error:
                # Out of memory, say: the next job begins from nothing.
                LOG.exception("a job failed")
                job.end(State.FAILED, ApiError(500, f"the model failed: {type(error).__name__}"))
                self.model.release()
            with self._ready:
                self._job = None
                behind = list(self._queue)
            for other in behind:
                other.tell()

    def _take(self) -> bool:
        """Wait for a job; False when the worker is to stop."""
        with self._ready:
            while not self._queue and not self._is_stopping:
                if not self._ready.wait(self._idle_seconds) and not self._queue:
                    self.model.release()
            if self._is_stopping:
                return False
            self._job = self._queue.pop(0)
        return True

    def _run(self, job: Job) -> None:
        job.state = State.IN_PROGRESS
        self._tell(Progress("reading"))
        if isinstance(job.work, Question):
            self._answer(job, replace(job.work, as_upstream=self._as_upstream))
        else:
            self._draw(job, [replace(each, as_upstream=self._as_upstream) for each in job.work])
        job.end(State.COMPLETED)

    def _draw(self, job: Job, requests: Sequence[Request]) -> None:
        """Make all images of a job, which differ in their seeds alone, side by side where that is faster."""
        try:
            visuals = prepare_visuals(requests[0])
            job.work = tuple(sized_by_source(request, visuals) for request in requests)
        except LanceError as error:
            raise ApiError(400, str(error).replace(f"{job.folder}/", "")) from None
        self.model.pipeline(requests[0].variant, looks=bool(visuals))
        for batch in batches(job.work, lambda request: request, None):
            self._draw_together(job, batch, visuals)

    def _draw_together(self, job: Job, batch: Sequence[Request], visuals: Sequence[PreparedVisual]) -> None:
        total = batch[0].num_steps
        shown = previewed_steps(total, job.previews)

        def follow(steps: list[Step]) -> None:
            done = steps[0].state.index + 1
            if done in shown:
                number = job.preview[0] + 1 if job.preview else 1
                job.preview = number, self._preview(batch[0], steps[0])
            self._tell(Progress("denoising", done, total))

        self._tell(Progress("denoising", 0, total))
        for made in self.model.generate_batch(batch, follow, [visuals] * len(batch)):
            # What is written into the file does not tell where the server keeps its own.
            given = tuple(replace(visual, path=Path(visual.path).name) for visual in made.request.visuals)
            made = replace(made, request=replace(made.request, visuals=given))
            frames = num_decoded_frames(made.request.latent_grid[0])
            path = job.folder / f"{made.request.task}-{len(job.outputs)}{'.mp4' if frames > 1 else '.png'}"
            made.save(path, track=lambda pixels, frames=frames: self._tracked(pixels, "decoding", frames))
            job.outputs.append(path)

    def _preview(self, request: Request, step: Step) -> bytes:
        """A PNG of what the first frame is heading for, in the size that it will have."""
        weights = self.model.pipeline(request.variant, looks=False).preview_weights
        _, rows, columns = request.latent_grid
        frame = preview(weights, clean_estimate(step)[: rows * columns], (1, rows, columns))
        encoded = io.BytesIO()
        Image.fromarray(frame).resize((request.width, request.height)).save(encoded, "PNG")
        return encoded.getvalue()

    def _answer(self, job: Job, question: Question) -> None:
        def follow(piece: str) -> None:
            job.pieces.append(piece)
            self._tell(Progress("answering", len(job.pieces), question.max_new_tokens))

        self.model.pipeline(question.variant, looks=True)
        self._tell(Progress("answering"))
        job.answer = self.model.answer(question, follow)

    def _track_loading(self, tensors: list) -> Iterable:
        return self._tracked(tensors, "loading", len(tensors))

    def _tracked(self, items: Iterable[Item], doing: str, total: int) -> Iterator[Item]:
        for done, item in enumerate(items):
            self._tell(Progress(doing, done, total))
            yield item

    def _tell(self, progress: Progress) -> None:
        """Let the job's followers know, and stop where there is none left."""
        job = self._job
        if job.is_cancelled:
            raise Cancelled
        job.progress = progress
        job.tell()


def previewed_steps(num_steps: int, previews: int) -> set[int]:
    """After which steps, counted from 1, a preview is due: evenly spread, and none after the last."""
    return {num_steps * (k + 1) // (previews + 1) for k in range(previews)} - {0, num_steps}
