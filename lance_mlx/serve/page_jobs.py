"""What the page's buttons do: queue a job, show how it gets on, keep what it made."""

import html
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi.concurrency import run_in_threadpool

from lance_mlx.media.preprocess import RESOLUTIONS
from lance_mlx.requests.request import Question, Request, Task, VisualKind
from lance_mlx.serve.bodies import FRAMES_A_SECOND, ChatBody, Drawing, parse
from lance_mlx.serve.bounds import BOUNDS
from lance_mlx.serve.errors import ApiError
from lance_mlx.serve.jobs import Job, State
from lance_mlx.serve.service import Service
from lance_mlx.serve.sizes import size_of
from lance_mlx.serve.uploads import check

PREVIEWS = 4
_HISTORY = 12
_OFTEN = 0.3
Updates = dict[str, Any]


class PageJobs:
    """The jobs of the page's visitors, by the session that each tab has.

    Args:
        kept: folder for what they made.
    """

    def __init__(self, service: Service, kept: Path) -> None:
        self._service = service
        self._kept = kept
        self._jobs: dict[str, list[Job]] = {}

    async def run(
        self, settings: dict[str, Any], entries: list[dict[str, Any]], session: str
    ) -> AsyncIterator[tuple[Updates, list[dict[str, Any]] | None]]:
        """Yield how the outputs change from the press of the button to the end, and the history when it has grown."""
        folder = self._service.new_folder()
        try:
            work = await run_in_threadpool(_work, settings, folder)
            job = self._service.submit(work, folder, PREVIEWS)
        except ApiError as error:
            shutil.rmtree(folder, ignore_errors=True)
            yield {"status": _said(str(error), failed=True)}, None
            return
        self._jobs.setdefault(session, []).append(job)
        try:
            yield _emptied(settings["task"]), None
            async for updates in self._follow(job):
                yield updates, None
            if job.state is State.CANCELLED:
                yield {"status": _said("Cancelled.")}, None
                return
            if job.error:
                yield {"status": _said(str(job.error), failed=True)}, None
                return
            entry = await run_in_threadpool(self._keep, job, settings)
            for old in entries[: len(entries) - _HISTORY + 1]:
                _remove(old)
            entries = [*entries[-_HISTORY + 1 :], entry]
            yield _result(entry) | {"status": _said(f"Done in {job.finished - job.created:.1f} s.")}, entries
        finally:
            self._service.drop(job)
            self._jobs[session].remove(job)
            if not self._jobs[session]:
                del self._jobs[session]

    async def _follow(self, job: Job) -> AsyncIterator[Updates]:
        pieces = seen = 0
        while not job.is_over:
            began = time.monotonic()
            updates = {"status": _progress(self._service.status(job), job)}
            if len(job.pieces) > pieces:
                pieces = len(job.pieces)
                updates["answer"] = "".join(job.pieces)
            if job.preview and job.preview[0] > seen:
                seen, png = job.preview
                path = job.folder / f"preview-{seen}.png"
                path.write_bytes(png)
                updates["image"] = gr.update(value=str(path), visible=True, label="Preview")
            yield updates
            await job.changed(5)
            # A page that is told of every token at once would fall behind.
            while not job.is_over and time.monotonic() < began + _OFTEN:
                await job.changed(_OFTEN)

    def _keep(self, job: Job, settings: dict[str, Any]) -> dict[str, Any]:
        work = job.work if isinstance(job.work, Question) else job.work[0]
        entry = {"settings": settings | {"seed": work.seed}, "answer": job.answer and job.answer.text, "file": None}
        if job.outputs:
            made = job.outputs[0]
            place = Path(tempfile.mkdtemp(prefix="made-", dir=self._kept))
            entry["file"] = str(shutil.copyfile(made, place / f"lance-{work.seed}{made.suffix}"))
        return entry

    def cancel(self, request: gr.Request) -> Updates | str:
        """Cancel what a tab has asked for; `run` says when it has ended."""
        jobs = list(self._jobs.get(request.session_hash, []))
        for job in jobs:
            self._service.worker.cancel(job)
        return gr.skip() if jobs else _said("There is nothing to cancel.")

    def leave(self, request: gr.Request) -> None:
        """Cancel what a tab has asked for that was closed."""
        self.cancel(request)

    def forget(self, entries: list[dict[str, Any]]) -> None:
        """Remove the files of a history that nobody looks at any more."""
        for entry in entries:
            _remove(entry)

    def show(self, entries: list[dict[str, Any]], index: int | None) -> Updates:
        """An entry of the history as outputs."""
        if index is None or index >= len(entries):
            return {"status": _said("Choose something from the history.")}
        entry = entries[index]
        return _emptied(entry["settings"]["task"]) | _result(entry) | {"status": _said("From before.")}


def label_of(entry: dict[str, Any]) -> str:
    """An entry of the history in a line."""
    settings = entry["settings"]
    prompt = " ".join((settings["prompt"] or "").split())
    return f"{settings['task']}: {prompt[:60] or 'describe'}, seed {settings['seed']}"


def _work(settings: dict[str, Any], folder: Path) -> tuple[Request, ...] | Question:
    """What the settings ask for, its files copied into a folder; raises ApiError."""
    task = Task(settings["task"])
    given = [settings["video"]] if task.takes is VisualKind.VIDEO else [path for path, _ in settings["images"] or ()]
    given = [path for path in given if path] if task.takes else []
    if len(given) > BOUNDS.visuals:
        raise ApiError(400, f"at most {BOUNDS.visuals} images can be given")
    if task.takes and not given:
        raise ApiError(400, f"Add {'an image' if task.takes is VisualKind.IMAGE else 'a video'} first.")
    visuals = []
    for index, path in enumerate(given):
        copy = Path(shutil.copyfile(path, folder / f"{index}-upload"))
        visuals.append(check(copy, Path(path).name, task.takes))
    shared = {"resolution": settings["resolution"]}
    if settings["seed"] is not None and settings["seed"] >= 0:
        shared["seed"] = int(settings["seed"])
    if task.answers:
        asked = {name: settings[name] for name in ("max_tokens", "temperature")}
        body = parse(ChatBody, {"messages": [{}], **asked, **shared})
        return body.question(task, settings["prompt"] or "", settings["instruction"] or None, tuple(visuals))
    if not (settings["prompt"] or "").strip():
        raise ApiError(400, "Write a prompt first.")
    names = ("prompt", "num_steps", "guidance_scale", "timestep_shift")
    body = parse(Drawing, {**{name: settings[name] for name in names}, **shared})
    size = size_of(settings["aspect"], RESOLUTIONS[settings["resolution"]][0])
    frames = FRAMES_A_SECOND * int(settings["seconds"]) + 1
    values = {"num_frames": frames} if task in (Task.T2V, Task.I2V) else {}
    return (body.request(task, tuple(visuals), size, **values),)


def _emptied(task: str) -> Updates:
    """Outputs of a task before there are any."""
    task = Task(task)
    return {
        "image": gr.update(value=None, visible=not task.answers and not task.is_for_video, label="Image"),
        "video": gr.update(value=None, visible=not task.answers and task.is_for_video),
        "answer": gr.update(value="", visible=task.answers),
    }


def _result(entry: dict[str, Any]) -> Updates:
    if entry["file"] is None:
        return {"answer": entry["answer"]}
    still = entry["file"].endswith(".png")
    return {
        "image": gr.update(value=entry["file"] if still else None, visible=still, label="Image"),
        "video": gr.update(value=None if still else entry["file"], visible=not still),
    }


def _progress(status: str, job: Job) -> str:
    share = f' value="{job.progress.done}" max="{job.progress.total}"' if job.progress.total else ""
    return f"{_said(status[:1].upper() + status[1:])}<progress aria-label='Progress'{share}></progress>"


def _said(line: str, failed: bool = False) -> str:
    return f"<p role='{'alert' if failed else 'status'}'>{html.escape(line[:1].upper() + line[1:])}</p>"


def _remove(entry: dict[str, Any]) -> None:
    if entry["file"] is not None:
        shutil.rmtree(Path(entry["file"]).parent, ignore_errors=True)
