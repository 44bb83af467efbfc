"""/v1/images: drawn from a prompt, or from images and a prompt."""

import base64
import time
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from lance_mlx.requests.request import Request, Task, VisualKind
from lance_mlx.serve.bodies import EditBody, ImageBody, parse
from lance_mlx.serve.bounds import BOUNDS
from lance_mlx.serve.errors import ApiError
from lance_mlx.serve.jobs import Job
from lance_mlx.serve.service import Service, read_form, read_json
from lance_mlx.serve.uploads import from_file


def image_routes(service: Service) -> APIRouter:
    """POST /v1/images/generations and /v1/images/edits."""
    router = APIRouter(prefix="/v1/images")

    @router.post("/generations")
    async def generations(request: HttpRequest) -> Response:
        async with service.receiving(request) as folder:
            body = parse(ImageBody, await read_json(request))
            job = service.submit(body.requests(Task.T2I), folder, body.partial_images if body.stream else 0)
        return await _respond(service, request, job, body.stream, "image_generation")

    @router.post("/edits")
    async def edits(request: HttpRequest) -> Response:
        async with service.receiving(request) as folder, read_form(request) as (values, files):
            body = parse(EditBody, values)
            given = [file for name, file in files if name in ("image", "image[]")]
            if len(given) < len(files):
                raise ApiError(400, "only images can be given: this model knows no masks", "unknown_parameter", "mask")
            if not 1 <= len(given) <= BOUNDS.visuals:
                raise ApiError(400, f"give 1 to {BOUNDS.visuals} images, not {len(given)}", param="image")
            visuals = tuple(
                [await run_in_threadpool(from_file, f.file, f.filename, folder, VisualKind.IMAGE) for f in given]
            )
            work = body.requests(body.task, visuals)
            job = service.submit(work, folder, body.partial_images if body.stream else 0)
        return await _respond(service, request, job, body.stream, "image_edit")

    return router


async def _respond(service: Service, request: HttpRequest, job: Job, stream: bool, kind: str) -> Response:
    if not stream:
        return await service.reply(request, job, _result)
    sent: list[int] = []

    def news(job: Job) -> Iterator[dict[str, Any]]:
        # One preview at a time is kept: whoever reads slowly misses some.
        if job.preview and job.preview[0] not in sent:
            sent.append(job.preview[0])
            index = job.preview[0] - 1
            yield _event(f"{kind}.partial_image", job.work[0], job.preview[1]) | {"partial_image_index": index}
        if job.is_over:
            for work, path in zip(job.work, job.outputs, strict=True):
                yield _event(f"{kind}.completed", work, path.read_bytes())

    return service.stream(job, news)


def _event(kind: str, work: Request, png: bytes) -> dict[str, Any]:
    return {
        "type": kind,
        "b64_json": base64.b64encode(png).decode(),
        "created_at": int(time.time()),
        "size": _size(png),
        "seed": work.seed,
        "background": "opaque",
        "output_format": "png",
        "quality": "auto",
    }


def _result(job: Job) -> dict[str, Any]:
    made = [path.read_bytes() for path in job.outputs]
    data = [
        {"b64_json": base64.b64encode(png).decode(), "seed": work.seed}
        for work, png in zip(job.work, made, strict=True)
    ]
    return {"created": int(time.time()), "data": data, "output_format": "png", "size": _size(made[0])}


def _size(png: bytes) -> str:
    # The header of a PNG.
    return f"{int.from_bytes(png[16:20])}x{int.from_bytes(png[20:24])}"
