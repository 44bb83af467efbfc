"""The server: API and page in one app, before one worker."""

import errno
import logging
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from lance_mlx.errors import LanceError
from lance_mlx.requests.request import Variant
from lance_mlx.serve.bodies import MODEL
from lance_mlx.serve.chat import chat_routes
from lance_mlx.serve.errors import ApiError
from lance_mlx.serve.guard import LOG, Guard
from lance_mlx.serve.images import image_routes
from lance_mlx.serve.service import Service
from lance_mlx.serve.videos import video_routes
from lance_mlx.serve.worker import Worker

_END_SECONDS = 2
_IDLE_SECONDS = 60
"""Longer than clients keep a connection that nothing goes through, or one would be closed while they use it again."""
_JOIN_SECONDS = 10


def make_app(worker: Worker, root: Path, variants: Iterable[Variant], token: str | None) -> ASGIApp:
    """The app: the API under /v1, /health, and the page at /.

    Args:
        worker: is started and stopped with the app.
        root: a folder for temporary files.
        variants: the models that the checkpoint holds.
        token: what clients must bring, if anything.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    service = Service(worker, root, variants)
    app.add_exception_handler(ApiError, lambda request, error: error.response)
    app.add_exception_handler(HTTPException, _as_openai)
    app.add_exception_handler(RequestValidationError, _as_openai)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        waiting, working = worker.load
        return {"status": "ok", "waiting": waiting, "working": working}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        if name != MODEL:
            raise ApiError(404, f"there is no model '{name[:60]}' here: use '{MODEL}'", "model_not_found")
        return _model()

    for routes in (image_routes, video_routes, chat_routes):
        app.include_router(routes(service))

    @app.api_route("/v1/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    async def unknown(path: str) -> None:
        raise ApiError(404, f"there is no /v1/{path[:60]} here, or not with this method", "unknown_url")

    uploads = root / "page"
    uploads.mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    # Only now, since Gradio looks there while it is imported.
    from lance_mlx.serve.page import mount_page

    mount_page(app, service, uploads)
    return Guard(app, token, uploads)


def serve(worker: Worker, variants: Iterable[Variant], host: str, port: int, token: str | None) -> None:
    """Serve until interrupted; temporary files are gone afterwards. Raises LanceError for a host or port that cannot
    be listened on."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        option = "port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "host"
        raise LanceError(
            f"cannot listen on {host}, port {port} ({error.strerror}): choose another --{option}"
        ) from None
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s")
    LOG.setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="lance-serve-", ignore_cleanup_errors=True) as root:
        app = make_app(worker, Path(root), variants, token)
        config = uvicorn.Config(
            app,
            host,
            port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=_END_SECONDS,
        )
        server = _Server(config, worker)
        shown = f"[{host}]" if ":" in host else host
        LOG.info("http://%s:%d/ is the page, http://%s:%d/v1 the API; Ctrl-C ends", shown, port, shown, port)
        try:
            server.run([listener])
        except KeyboardInterrupt:
            pass
        finally:
            worker.stop()
            ended = worker.join(_JOIN_SECONDS)
    LOG.info("ended")
    if not ended:
        # A step takes longer than anybody waits for it, and its thread would abort the interpreter's own ending.
        logging.shutdown()
        os._exit(0)


class _Server(uvicorn.Server):
    """Ends the jobs first, so that nobody who waits for one holds the server up."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Note a signal."""
        self._worker.stop()
        # What it would say is that open pages, which never end by themselves, are cut off.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)


def _model() -> dict[str, Any]:
    return {"id": MODEL, "object": "model", "created": 0, "owned_by": "bytedance"}


async def _as_openai(request: HttpRequest, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail)).response
    return ApiError(400, "a parameter of the address is of the wrong kind", "invalid_value").response
