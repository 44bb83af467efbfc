"""What the API's routes share: receiving a body, queueing a job, and keeping its client company until it is over."""

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lance_mlx.requests.request import Question, Request, Variant
from lance_mlx.serve.errors import ApiError
from lance_mlx.serve.jobs import Job, State
from lance_mlx.serve.worker import Worker

SILENCE = 15.0
"""Seconds after which a client hears something, so that neither it nor a proxy gives up."""
_SMALL = 1 << 20
_FORM, _FORMS = "multipart/form-data", 8
_RECEIVE_SECONDS = 300.0
_LOOK = 0.5
Result = Callable[[Job], dict[str, Any]]
News = Callable[[Job], Iterable[dict[str, Any]]]


class Service:
    """The worker, and the folder that every job gets one in.

    Args:
        variants: the models that the checkpoint holds.
    """

    def __init__(self, worker: Worker, root: Path, variants: Iterable[Variant]) -> None:
        self.worker = worker
        self.root = root
        self._variants = tuple(variants)
        # JSON is kept in memory, so one large body at a time; forms on the disk, where a slow one holds nobody up.
        self._large, self._forms = asyncio.Semaphore(1), asyncio.Semaphore(_FORMS)

    @asynccontextmanager
    async def receiving(self, request: HttpRequest) -> AsyncIterator[Path]:
        """A folder for what the body brings, removed if that cannot be used; a large body waits for its turn."""
        folder = self.new_folder()
        try:
            if int(request.headers.get("content-length", 0)) <= _SMALL:
                yield folder
                return
            kind = request.headers.get("content-type", "").lower()
            turn = self._forms if kind.startswith(_FORM) else self._large
            async with turn, asyncio.timeout(_RECEIVE_SECONDS):
                yield folder
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, TimeoutError):
                raise ApiError(408, f"the body did not arrive in {_RECEIVE_SECONDS:.0f} seconds") from None
            raise

    def new_folder(self) -> Path:
        """An empty folder for a job."""
        return Path(tempfile.mkdtemp(prefix="job-", dir=self.root))

    def submit(self, work: tuple[Request, ...] | Question, folder: Path, previews: int = 0) -> Job:
        """Queue a job; raises ApiError where the queue is full or the checkpoint lacks the model."""
        variant = work.variant if isinstance(work, Question) else work[0].variant
        if variant not in self._variants:
            raise ApiError(400, f"this server's checkpoint has no model for {variant.kind}s", "model_not_found")
        return self.worker.submit(Job(work, folder, previews))

    def drop(self, job: Job) -> None:
        """End a job whose client has gone or has got everything, and remove its files."""
        if not job.is_over:
            self.worker.cancel(job)
        job.clear()

    def status(self, job: Job) -> str:
        """Where a job stands, in words."""
        if job.state is State.QUEUED:
            return f"in the queue, {self.worker.before(job)} before this one"
        if job.state is State.IN_PROGRESS:
            return "cancelling" if job.is_cancelled else str(job.progress)
        return str(job.state)

    async def reply(self, request: HttpRequest, job: Job, result: Result) -> Response:
        """The result as JSON; where it takes long, spaces are sent ahead of it, which JSON allows.

        A failure has its own status unless spaces are on their way already.
        """
        limit = time.monotonic() + SILENCE
        try:
            while not job.is_over and time.monotonic() < limit:
                await job.changed(_LOOK)
                if await request.is_disconnected():
                    raise ApiError(499, "the client has gone")
            if job.is_over:
                if job.error:
                    raise job.error
                return _Following(self, job, iter([json.dumps(result(job))]), "application/json")
        except BaseException:
            self.drop(job)
            raise
        return _Following(self, job, self._spaces(job, result), "application/json")

    def stream(self, job: Job, news: News, last: str = "") -> Response:
        """Server-sent events: what `news` gives at each change, progress as comments, the error if there is one."""
        return _Following(self, job, self._events(job, news, last), "text/event-stream")

    async def _spaces(self, job: Job, result: Result) -> AsyncIterator[str]:
        while not job.is_over:
            yield " "
            limit = time.monotonic() + SILENCE
            while not job.is_over and time.monotonic() < limit:
                await job.changed(SILENCE)
        yield json.dumps(job.error.body if job.error else result(job))

    async def _events(self, job: Job, news: News, last: str) -> AsyncIterator[str]:
        said, heard = "", 0.0
        while True:
            over = job.is_over
            if over and job.error:
                yield _event(job.error.body)
                return
            for event in news(job):
                yield _event(event)
                heard = time.monotonic()
            if over:
                break
            status, now = self.status(job), time.monotonic()
            if (status != said and now > heard + _LOOK) or now > heard + SILENCE:
                said, heard = status, now
                yield f": {status}\n\n"
            await job.changed(SILENCE)
        yield last


class _Following(StreamingResponse):
    """A body that a job gives, which is dropped with its client, whether or not the body has begun."""

    def __init__(self, service: Service, job: Job, content: Iterator[str] | AsyncIterator[str], kind: str) -> None:
        super().__init__(content, media_type=kind, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._drop = partial(service.drop, job)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._drop()


async def read_json(request: HttpRequest) -> Any:
    """The body as JSON; raises ApiError where it is not."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send JSON, with Content-Type: application/json")
    body = await request.body()
    try:
        values = await run_in_threadpool(json.loads, body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON", "invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", "invalid_json")
    return values


@asynccontextmanager
async def read_form(request: HttpRequest) -> AsyncIterator[tuple[dict[str, str], list[tuple[str, UploadFile]]]]:
    """Fields and files of a multipart body; raises ApiError where it is none."""
    if not request.headers.get("content-type", "").lower().startswith(_FORM):
        raise ApiError(415, "send a form, with Content-Type: multipart/form-data")
    async with request.form(max_files=16, max_fields=64) as form:
        values, files = {}, []
        for name, value in form.multi_items():
            if isinstance(value, str):
                values[name] = value
            else:
                files.append((name, value))
        yield values, files


def _event(values: dict[str, Any]) -> str:
    kind = f"event: {values['type']}\n" if "type" in values else ""
    return f"{kind}data: {json.dumps(values, ensure_ascii=False)}\n\n"
