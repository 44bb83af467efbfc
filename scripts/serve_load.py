#!/usr/bin/env python3
"""Load `lance-mlx serve` with many clients at once, with such as vanish, and with what it has to refuse.

    python scripts/serve_load.py [--model DIR] [--requests 200] [--clients 8] [--output docs/serve.md]

Clients take turns at OpenAI's own library and at plain sockets, and at drawing, editing and asking, streamed or not.
What each got is checked; then come clients that leave without reading, bodies of a gigabyte, files that are not what
they say, and paths and names that lead out of the server's folder. Prints one row for each: what was sent, what became
of it, and the server's memory in use (resident, on Linux alone).
Exit status: 0 nothing lost and nothing read, 1 otherwise.
"""

import argparse
import base64
import http.client
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import local

import openai
from PIL import Image
from tables import replace_between, table

CHECKPOINT = Path(__file__).parents[1] / "oracles" / "checkpoint-a"
GIGABYTE = 1 << 30
SMALL = {"size": "32x32", "num_steps": 2}
FAST = {"resolution": "image_256res"}
SECRET = b"what no client may read"
JSON = {"Content-Type": "application/json"}
HEADS = ["sent", "outcome", "time", "memory of the server"]


def picture(width: int = 96, height: int = 64) -> bytes:
    """A PNG of random pixels."""
    file = io.BytesIO()
    pixels = random.Random(0).randbytes(width * height * 3)
    Image.frombytes("RGB", (width, height), pixels).save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    """A file as it stands in JSON."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def chat(words: str, stream: bool = False) -> dict:
    """A question about a picture."""
    content = [{"type": "image_url", "image_url": {"url": data_url(picture())}}, {"type": "text", "text": words}]
    messages = [{"role": "user", "content": content}]
    return {"model": "lance", "messages": messages, "max_tokens": 4, "stream": stream}


def is_png(text: str) -> bool:
    """Whether base64 holds a picture."""
    Image.open(io.BytesIO(base64.b64decode(text))).load()
    return True


def form(fields: dict[str, str], name: str, content: bytes) -> tuple[bytes, dict[str, str]]:
    """A multipart body with one file, and its headers."""
    parts = [f'--x1y2\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{fields[key]}\r\n' for key in fields]
    parts.append(f'--x1y2\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n')
    body = "".join(parts).encode() + content + b"\r\n--x1y2--\r\n"
    return body, {"Content-Type": "multipart/form-data; boundary=x1y2"}


class Client:
    """One client: OpenAI's library, and a connection of its own that it keeps."""

    def __init__(self, port: int) -> None:
        self.library = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        self.kept = http.client.HTTPConnection("127.0.0.1", port, timeout=300)

    def raw(self, method: str, path: str, body: bytes | str = b"", headers: dict | None = None) -> tuple[int, bytes]:
        """One request by the connection that is kept."""
        self.kept.request(method, path, body, headers or {})
        answer = self.kept.getresponse()
        return answer.status, answer.read()

    def ask(self, number: int) -> str:
        """One of seven requests; returns what became of it."""
        words, kind = f"number {number}", number % 7
        try:
            return "answered" if self._ask(kind, words) else f"wrong answer to kind {kind}"
        except Exception as error:  # whatever a client may see
            return f"{type(error).__name__} {getattr(error, 'code', '') or ''}".strip()

    def _ask(self, kind: int, words: str) -> bool:
        images, completions = self.library.images, self.library.chat.completions
        if kind == 0:
            made = images.generate(prompt=words, size=SMALL["size"], extra_body={"num_steps": SMALL["num_steps"]})
            return is_png(made.data[0].b64_json)
        if kind == 1:
            made = images.edit(image=("a.png", picture()), prompt=words, extra_body=FAST | {"num_steps": 1})
            return is_png(made.data[0].b64_json)
        if kind == 2:
            return completions.create(**chat(words), extra_body=FAST).choices[0].finish_reason is not None
        if kind == 3:
            pieces = list(completions.create(**chat(words, stream=True), extra_body=FAST))
            return pieces[-1].choices[0].finish_reason is not None
        if kind == 4:
            status, answer = self.raw("POST", "/v1/images/generations", json.dumps(SMALL | {"prompt": words}), JSON)
            return status == 200 and is_png(json.loads(answer)["data"][0]["b64_json"])
        if kind == 5:
            body = json.dumps(SMALL | {"prompt": words, "stream": True})
            status, answer = self.raw("POST", "/v1/images/generations", body, JSON)
            return status == 200 and b"image_generation.completed" in answer
        body, headers = form(FAST | {"prompt": words, "num_steps": "1"}, "a.png", picture())
        status, answer = self.raw("POST", "/v1/images/edits", body, headers)
        return status == 200 and is_png(json.loads(answer)["data"][0]["b64_json"])


def vanish(port: int, number: int) -> str:
    """Ask for what takes long, and leave."""
    body = SMALL | {"prompt": "gone", "num_steps": 200, "stream": bool(number % 2), "size": "256x256"}
    path, values = ("/v1/chat/completions", chat("a " * 400)) if number % 4 == 3 else ("/v1/images/generations", body)
    content = json.dumps(values).encode()
    sent = content[: len(content) // 2] if number % 5 == 4 else content
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + sent)
        time.sleep(random.Random(number).random())
    return "left"


def large(port: int, number: int) -> str:
    """Send a gigabyte: said beforehand, in pieces, as a file of the page, or more than was said."""
    claimed = str(len(b"{}")) if number % 4 == 3 else str(GIGABYTE)
    length = "Transfer-Encoding: chunked" if number % 4 == 1 else f"Content-Length: {claimed}"
    path = "/gradio_api/upload" if number % 4 == 2 else "/v1/videos"
    kind = "multipart/form-data; boundary=x1y2" if number % 4 == 2 else "application/json"
    block, sent = bytes(1 << 20), 0
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n{length}\r\n\r\n"
        connection.sendall(head.encode())
        try:
            while sent < GIGABYTE:
                connection.sendall(b"100000\r\n" + block + b"\r\n" if number % 4 == 1 else block)
                sent += len(block)
        except OSError:
            pass
        try:
            status = connection.recv(100)[9:12].decode()
        except OSError:
            status = "cut off"
    return f"{status} after {'less than 64 MiB' if sent < 64 << 20 else f'{sent >> 20} MiB'}"


def hostile() -> dict[str, bytes]:
    """Files that are not what they say."""
    whole = picture()
    head = b"IHDR" + (30000).to_bytes(4) * 2 + b"\x08\x02\x00\x00\x00"
    return {
        "list": b"#EXTM3U\n#EXTINF:1,\nfile:///SECRET\n",
        "concat": b"ffconcat version 1.0\nfile 'SECRET'\n",
        "script": b"%!PS-Adobe-3.0 EPSF-3.0\n(SECRET) (r) file\n",
        "drawing": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file://SECRET"/></svg>',
        "bomb": whole[:8] + (13).to_bytes(4) + head + zlib.crc32(head).to_bytes(4) + whole[33:],
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "video": b"\x00\x00\x00 ftypisom" + bytes(64),
        "noise": random.Random(1).randbytes(60_000_000),
    }


def send_file(client: Client, name: str, content: bytes) -> str:
    """Give a file to be edited."""
    body, headers = form(FAST | {"prompt": "x", "num_steps": "1"}, f"{name}.png", content)
    status, answer = client.raw("POST", "/v1/images/edits", body, headers)
    return "read" if SECRET in answer else str(status)


def paths(secret: Path) -> list[str]:
    """Addresses that would lead to a file outside."""
    up = "/".join([".."] * 12)
    steps = (up, up.replace("/", "%2f"), up.replace(".", "%2e"), up.replace("/", "\\"))
    places = (
        "/gradio_api/file=",
        "/static/",
        "/assets/",
        "/svelte/",
        "/v1/videos/",
        "/file=",
        "//",
        "/gradio_api/file/",
    )
    return [f"{place}{step}{secret}" for place in places for step in ("", *steps)]


def look(client: Client, path: str) -> str:
    """Ask for an address."""
    status, answer = client.raw("GET", path)
    return "read" if SECRET in answer else str(status)


def memory(process: int) -> str:
    """Resident megabytes of a process now and at its most; nothing where there is no /proc."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return ""
    now, most = (next(int(line.split()[1]) for line in lines if line.startswith(name)) for name in ("VmRSS", "VmHWM"))
    return f"{now / 1024:.0f} MiB, at most {most / 1024:.0f}"


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--output", type=Path, help="a Markdown file with a place for the table")
    options = parser.parse_args()
    with socket.socket() as taken, tempfile.TemporaryDirectory() as folder:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.close()
        files, log, secret = Path(folder, "files"), Path(folder, "log"), Path(folder, "secret")
        files.mkdir()
        secret.write_bytes(SECRET)
        command = "from lance_mlx.cli.main import main; main()"
        with log.open("w") as opened:
            process = subprocess.Popen(
                [sys.executable, "-c", command, "serve", "--model", str(options.model), "--port", str(port)],
                stdout=opened,
                stderr=opened,
                env=os.environ | {"TMPDIR": str(files), "LANCE_MLX_TOKEN": ""},
            )
        try:
            return _load(process, port, files, log, secret, options)
        finally:
            process.kill()
            process.wait()


def _load(process: subprocess.Popen, port: int, files: Path, log: Path, secret: Path, options) -> int:
    _until(lambda: _health(port) is not None)
    own, right, rows = local(), True, []

    def client() -> Client:
        own.client = getattr(own, "client", None) or Client(port)
        return own.client

    def row(what: str, calls: list[Callable[[], str]], wanted: tuple[str, ...]) -> None:
        nonlocal right
        started = time.monotonic()
        with ThreadPoolExecutor(options.clients) as clients:
            told = Counter(clients.map(lambda call: call(), calls))
        _until(lambda: _health(port) == (0, False) and not list(files.glob("*/job-*")))
        right &= all(name.startswith(wanted) for name in told)
        outcomes = ", ".join(f"{count} {name}" for name, count in told.most_common())
        rows.append([what, outcomes, f"{time.monotonic() - started:.0f} s", memory(process.pid)])
        print(f"| {' | '.join(rows[-1])} |", flush=True)

    row("one request", [lambda: client().ask(0)], ("answered",))
    asked = [lambda number=number: client().ask(number) for number in range(options.requests)]
    row(f"{len(asked)} requests, {options.clients} at once", asked, ("answered",))
    row("40 clients that leave", [lambda n=n: vanish(port, n) for n in range(40)], ("left",))
    row("8 bodies of 1 GiB", [lambda n=n: large(port, n) for n in range(8)], ("4", "cut off"))
    bad = [(name, content.replace(b"SECRET", str(secret).encode())) for name, content in hostile().items()]
    row(f"{2 * len(bad)} files that pretend", [lambda b=b: send_file(client(), *b) for b in bad * 2], ("400", "413"))
    heavy = json.dumps({"prompt": "x", "input_reference": {"image_url": data_url(hostile()["noise"])}})
    row("8 of 60 MB in JSON", [lambda: str(client().raw("POST", "/v1/videos", heavy, JSON)[0])] * 8, ("400",))
    names = [str(secret), f"../../..{secret}", "..%2f..%2fsecret", "a" * 5000, "a\\..\\..\\b", "."]
    row(f"{len(names)} names", [lambda n=n: send_file(client(), n, picture()) for n in names], ("200", "400"))
    looks = paths(secret)
    row(f"{len(looks)} paths", [lambda p=p: look(client(), p) for p in looks], ("4",))
    row("one request", [lambda: client().ask(0)], ("answered",))
    process.send_signal(signal.SIGINT)
    status, left, told = process.wait(30), sum(path.is_file() for path in files.rglob("*")), log.read_text()
    if options.output:
        replace_between(options.output, "load", table(HEADS, rows))
    print(f"ended with {status}, {left} files left, {told.count('Traceback')} tracebacks in its log")
    return 0 if right and (status, left) == (0, 0) and "Traceback" not in told else 1


def _health(port: int) -> tuple[int, bool] | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            values = json.load(answer)
            return values["waiting"], values["working"]
    except OSError:
        return None


def _until(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            sys.exit("serve_load: the server does not come to rest")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
