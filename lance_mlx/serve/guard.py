"""What stands before every request: who may ask, from where, for which paths; and the line of log that it leaves."""

import base64
import binascii
import hmac
import ipaddress
import json
import logging
import re
import time
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lance_mlx.serve.bounds import BOUNDS
from lance_mlx.serve.errors import ApiError

LOG = logging.getLogger("lance_mlx.serve")
_API = re.compile(r"/(v1/.*|health)")
# Of Gradio's paths those that the page needs. Others fetch URLs, take code, or list what is there.
_PAGE = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)|/(assets|static|svelte)/.*"
    r"|/gradio_api/(app_id|info|startup-events|upload|upload_progress|reset|cancel|heartbeat/\w+|queue/(join|data)"
    r"|theme\.css|login_check|user|token|file=.*)/?"
)
_FILE = "/gradio_api/file="
_QUIET = re.compile(
    r"/(assets|static|svelte)/|/gradio_api/(heartbeat|upload_progress|startup-events|app_id|login_check)"
)


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine's alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """An ASGI app that lets through to another one what may pass.

    Args:
        token: what every request but /health must bring, as a bearer token or as the password of HTTP's basic scheme.
            Without one, requests under other names than this machine's are refused, so that no web site can reach the
            server by pointing a name of its own there.
        uploads: the one folder that files of the page are read from.
    """

    def __init__(self, app: ASGIApp, token: str | None, uploads: Path) -> None:
        self._app = app
        self._token = token
        self._uploads = uploads.resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # nothing here speaks over web sockets
        began, status = time.monotonic(), 499

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            try:
                self._check(scope)
                if scope["path"] == "/gradio_api/queue/join":
                    receive = await self._checked_body(receive)
            except ApiError as error:
                await error.response(scope, receive, watch)
                return
            await self._app(scope, receive, watch)
        except ClientDisconnect:  # amid its body
            status = 499
        finally:
            path = scope["path"]
            if not _QUIET.match(path) or status >= 400:
                client = scope["client"][0] if scope.get("client") else "-"
                shown = json.dumps(path[:200])[1:-1]
                LOG.info("%s %s %s %d %.2f s", client, scope["method"], shown, status, time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if self._token is None and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            raise ApiError(403, "this server answers under the names of this machine alone", "wrong_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(403, "requests from other web sites are refused", "wrong_origin")
        if self._token is not None and path != "/health" and not self._is_known(headers):
            raise ApiError(401, "a token is needed: Authorization: Bearer TOKEN", "invalid_api_key")
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not length.isdecimal():
            raise ApiError(411, "say how long the body is: a Content-Length is needed")
        if int(length) > BOUNDS.body_bytes:
            raise ApiError(413, f"a request may have at most {BOUNDS.body_bytes >> 20} MiB: send less", "too_large")
        if _API.fullmatch(path):
            return
        if not _PAGE.fullmatch(path):
            raise ApiError(404, "there is nothing here")
        if path.startswith(_FILE):
            self._check_file(path.removeprefix(_FILE))
        if path.rstrip("/") == "/gradio_api/upload" and _size(self._uploads) > BOUNDS.page_bytes:
            raise ApiError(507, "the server holds too many uploaded files: try again later", "no_space")

    def _is_known(self, headers: Headers) -> bool:
        scheme, _, value = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError, ValueError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(value.strip().encode(), self._token.encode())

    def _check_file(self, name: str) -> None:
        path = Path(name)
        try:
            inside = path.is_absolute() and path.resolve().is_relative_to(self._uploads) and path.is_file()
        except (OSError, ValueError):
            inside = False
        if not inside:
            raise ApiError(404, "there is no such file")

    async def _checked_body(self, receive: Receive) -> Receive:
        """Look through what the page sends for files that were not uploaded, which Gradio would fetch by their URL."""
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(499, "the client has gone")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > 1 << 20:
                raise ApiError(413, "too much for a form: send files as uploads")
        try:
            self._check_paths(json.loads(body))
        except (ValueError, RecursionError):
            raise ApiError(400, "the body is not valid JSON", "invalid_json") from None
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replay

    def _check_paths(self, value: object) -> None:
        if isinstance(value, dict):
            if "path" in value:
                self._check_file(str(value["path"]))
            for inner in value.values():
                self._check_paths(inner)
        elif isinstance(value, list):
            for inner in value:
                self._check_paths(inner)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; some may go meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total
