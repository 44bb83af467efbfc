"""/v1/videos: jobs that are asked after, fetched and deleted."""

import re
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, Response

from lance_mlx.requests.request import Task, Visual, VisualKind
from lance_mlx.serve.bodies import MODEL, VideoBody, parse
from lance_mlx.serve.bounds import BOUNDS
from lance_mlx.serve.errors import ApiError
from lance_mlx.serve.jobs import Job, State
from lance_mlx.serve.service import Service, read_form, read_json
from lance_mlx.serve.uploads import check, from_data_url, from_file

_DEFAULT_SIZE = 848, 480
_KINDS = {".mp4": "video/mp4", ".png": "image/png"}


class Videos:
    """The jobs for videos, in the order of their making; finished ones are kept up to a bound."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.jobs: dict[str, Job] = {}

    def add(self, job: Job) -> dict[str, Any]:
        """Keep a job, in the place of the oldest finished one where there are many; returns its description."""
        finished = [other for other in self.jobs.values() if other.is_over]
        for other in finished[: len(finished) - BOUNDS.kept + 1]:
            self.remove(other)
        self.jobs[job.id] = job
        return self.describe(job)

    def find(self, identity: str) -> Job:
        """The job of that id; raises ApiError where there is none."""
        if identity not in self.jobs:
            raise ApiError(404, "there is no such video: it was deleted, or made room for newer ones", "not_found")
        return self.jobs[identity]

    def remove(self, job: Job) -> None:
        """End a job and forget it, its files included."""
        self.jobs.pop(job.id, None)
        self.service.drop(job)

    def finished(self, identity: str) -> Path:
        """The file that a job made; raises ApiError where there is none yet, or never will be."""
        job = self.find(identity)
        if job.state is not State.COMPLETED:
            raise job.error or ApiError(409, f"the video is not finished: {self.service.status(job)}", "not_ready")
        return job.outputs[0]

    def describe(self, job: Job) -> dict[str, Any]:
        """OpenAI's description of a video; `detail` says where it stands."""
        (request,) = job.work
        done = 100 if job.state is State.COMPLETED else 0
        if job.state is State.IN_PROGRESS and job.progress.doing in ("denoising", "decoding"):
            # Decoding is about a tenth.
            share = job.progress.done / max(job.progress.total, 1)
            done = int(90 * share if job.progress.doing == "denoising" else 90 + 9 * share)
        return {
            "id": job.id,
            "object": "video",
            "model": MODEL,
            "status": "failed" if job.state is State.CANCELLED else str(job.state),
            "progress": done,
            "detail": self.service.status(job),
            "created_at": int(job.created),
            "completed_at": int(job.finished) if job.finished else None,
            "prompt": request.prompt,
            "seconds": f"{request.num_frames / request.fps:.3g}",
            "size": f"{request.width}x{request.height}",
            "seed": request.seed,
            "error": job.error and {"code": job.error.code or "failed", "message": str(job.error)},
        }


def video_routes(service: Service) -> APIRouter:
    """The routes under /v1/videos."""
    router, videos = APIRouter(prefix="/v1/videos"), Videos(service)

    @router.post("")
    async def create(request: HttpRequest) -> dict[str, Any]:
        return await _create(request, videos, "input_reference")

    @router.post("/edits")
    async def edit(request: HttpRequest) -> dict[str, Any]:
        return await _create(request, videos, "video")

    @router.get("")
    async def listed(order: str = "desc", limit: int = 20, after: str = "") -> dict[str, Any]:
        jobs = list(videos.jobs.values()) if order == "asc" else list(videos.jobs.values())[::-1]
        ids = [job.id for job in jobs]
        jobs = jobs[ids.index(after) + 1 if after in ids else 0 :]
        shown = [videos.describe(job) for job in jobs[: max(limit, 1)]]
        ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {}
        return {"object": "list", "data": shown, "has_more": len(shown) < len(jobs), **ends}

    @router.get("/{identity}")
    async def retrieve(identity: str) -> dict[str, Any]:
        return videos.describe(videos.find(identity))

    @router.get("/{identity}/content")
    async def content(identity: str, variant: str = "video") -> Response:
        if variant != "video":
            raise ApiError(400, "only the video itself can be fetched", "invalid_value", "variant")
        path = videos.finished(identity)
        return FileResponse(path, media_type=_KINDS[path.suffix], filename=f"{identity}{path.suffix}")

    @router.delete("/{identity}")
    async def delete(identity: str) -> dict[str, Any]:
        videos.remove(videos.find(identity))
        return {"id": identity, "object": "video.deleted", "deleted": True}

    return router


async def _create(request: HttpRequest, videos: Videos, field: str) -> dict[str, Any]:
    """Queue a video from a prompt, and what `field` holds: a file, or an object that refers to one."""
    async with videos.service.receiving(request) as folder:
        if request.headers.get("content-type", "").startswith("application/json"):
            values = await read_json(request)
            reference, visuals = values.pop(field, None), ()
        else:
            async with read_form(request) as (values, files):
                reference = {name[len(field) + 1 : -1]: values.pop(name) for name in _nested(values, field)}
                if {name for name, _ in files} - {field} or len(files) > 1:
                    raise ApiError(400, f"one file can be given, as {field}", "unknown_parameter")
                visuals = tuple([await run_in_threadpool(from_file, f.file, f.filename, folder) for _, f in files])
        if reference:
            visuals = (await run_in_threadpool(partial(_referred, videos, reference, folder)),)
        task = _task(visuals, field)
        body = parse(VideoBody, values)
        frames = {} if task is Task.VIDEO_EDIT else {"num_frames": body.frames}
        job = videos.service.submit((body.request(task, visuals, _DEFAULT_SIZE, fps=body.fps, **frames),), folder)
    return videos.add(job)


def _nested(values: dict[str, str], field: str) -> list[str]:
    """The names of a form's fields that make up an object, such as video[id]."""
    return [name for name in values if re.fullmatch(rf"{field}\[[a-z_]+\]", name)]


def _referred(videos: Videos, reference: object, folder: Path) -> Visual:
    """The visual that an object refers to: {"image_url": a data: URL}, or {"id": of a finished video}."""
    if isinstance(reference, dict) and "id" in reference:
        made = videos.finished(str(reference["id"]))
        copy = folder / "video"
        copy.write_bytes(made.read_bytes())
        return check(copy, "video")
    if isinstance(reference, dict) and "image_url" in reference:
        return from_data_url(reference["image_url"], folder)
    raise ApiError(400, 'refer to a file by {"image_url": a data: URL} or {"id": of a finished video}', "invalid_value")


def _task(visuals: tuple[Visual, ...], field: str) -> Task:
    if not visuals:
        if field == "video":
            raise ApiError(400, "give the video to edit", param="video")
        return Task.T2V
    if visuals[0].kind is VisualKind.IMAGE and field == "video":
        raise ApiError(400, "an image is not a video: edit it with /v1/images/edits", param="video")
    return Task.I2V if visuals[0].kind is VisualKind.IMAGE else Task.VIDEO_EDIT
