"""Many clients at once, clients that vanish, and files that are not what they say, before a stubbed model."""

import http.client
import io
import itertools
import json
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from lance_mlx.api import Answer

pytest.importorskip("gradio", reason="the server needs its extra: pip install '.[serve,test]'")
openai = pytest.importorskip("openai", reason="the client of the API: pip install '.[test]'")


class Stub:
    """Answers with the question, draws a grey picture, and counts; each step takes `pause` seconds."""

    def __init__(self, track) -> None:
        self.pause, self.made, self.released = 0.0, [], 0

    def pipeline(self, variant, looks):
        return SimpleNamespace(preview_weights=np.zeros((49, 3), np.float32))

    def release(self) -> None:
        self.released += 1

    def generate_batch(self, requests, callback, visuals):
        for index in range(requests[0].num_steps):
            time.sleep(self.pause)
            state = SimpleNamespace(index=index, timestep=np.ones(1, np.float32), x_t=mx.zeros((1, 48)))
            callback([SimpleNamespace(state=state, velocity=mx.zeros((1, 48)))] * len(requests))
        self.made += [request.prompt for request in requests]
        return [Drawn(request) for request in requests]

    def answer(self, question, callback):
        for word in question.question.split():
            time.sleep(self.pause)
            callback(f"{word} ")
        self.made.append(question.question)
        return Answer(question, question.question, (1,), question.question, 0.0, 0.0)


def Drawn(request):  # noqa: N802 - stands for a dataclass
    from dataclasses import make_dataclass

    def save(self, path, track):
        list(track([0]))
        Image.new("RGB", (16, 16)).save(path, "PNG", pnginfo=None)

    return make_dataclass("Drawn", ["request"], namespace={"save": save})(request)


@pytest.fixture(scope="module")
def server(serving, tmp_path_factory):
    with serving(Stub, tmp_path_factory.mktemp("crowd"), waiting=8) as started:
        yield started


@pytest.fixture(autouse=True)
def settled(server):
    """Whatever a test does, nothing is left of it."""
    server.worker.model.pause = 0
    server.worker.model.made.clear()
    yield
    server.worker.model.pause = 0
    server.settle()


def small(client, prompt: str, steps: int = 1):
    return client.images.generate(prompt=prompt, size="16x16", extra_body={"num_steps": steps})


def ask(client, url: str, words: str, **options):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": words}]
    return client.chat.completions.create(model="lance", messages=[{"role": "user", "content": content}], **options)


def raw(server, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    """One request that no client library mends."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_two_hundred_requests_from_eight_clients_are_all_answered(server, picture, data_url):
    url = data_url(picture)

    client = server.client()

    def one(number: int) -> bool:
        words = f"number {number}"
        if number % 4:
            return bool(small(client, words).data)
        return ask(client, url, words).choices[0].message.content == words

    with ThreadPoolExecutor(8) as clients:
        assert all(clients.map(one, range(200)))
    assert sorted(server.worker.model.made) == sorted(f"number {number}" for number in range(200))


def test_a_full_queue_says_so_and_what_is_in_it_is_done(server):
    server.worker.model.pause, client = 0.2, server.client()

    def one(number: int) -> str:
        try:
            small(client, str(number), steps=3)
        except openai.RateLimitError as error:
            assert error.code == "queue_full" and "8 requests wait" in str(error)
            return "full"
        return "done"

    with ThreadPoolExecutor(16) as clients:
        told = list(clients.map(one, range(16)))
    assert told.count("full") in range(5, 9) and len(server.worker.model.made) == told.count("done")


def leave(server, path: str, body: dict, after: float) -> None:
    """Send a request and close the connection without reading the answer."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        time.sleep(after)


def test_the_job_of_a_client_that_vanishes_is_ended(server, picture, data_url, until):
    server.worker.model.pause = 0.2
    content = [{"type": "image_url", "image_url": {"url": data_url(picture)}}, {"type": "text", "text": "a " * 400}]
    chat = {"model": "lance", "messages": [{"role": "user", "content": content}]}
    bodies = [
        ("/v1/images/generations", {"prompt": "gone", "size": "16x16", "num_steps": 200}),
        ("/v1/images/generations", {"prompt": "gone", "size": "16x16", "num_steps": 200, "stream": True}),
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", chat | {"stream": True}),
    ]
    for path, body in bodies:
        for after in (0, 0.6):
            leave(server, path, body, after)
            server.settle(10)
    # In the queue as well as before the model.
    threads = [threading.Thread(target=leave, args=(server, *bodies[k % 4], 0.5)) for k in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: server.worker.load[0] >= 4)
    for thread in threads:
        thread.join()
    server.settle(10)
    assert server.worker.model.made == []


def test_a_slow_upload_does_not_hold_others_up(server, picture):
    head = "POST /v1/images/edits HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(f"{head}Content-Length: 3000000\r\n\r\n--x\r\n".encode())
        time.sleep(0.2)
        given = {"image": ("a.png", picture + bytes(2 << 20)), "prompt": "x", "extra_body": {"num_steps": 1}}
        assert server.client(timeout=10).images.edit(**given).data


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits", "/gradio_api/upload"])
def test_a_client_that_vanishes_amid_its_body_leaves_a_line(server, until, caplog, path):
    caplog.set_level("INFO")
    kind = "application/json" if path.endswith("generations") else "multipart/form-data; boundary=x1y2z3"
    part = b'--x1y2z3\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nhalf'
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: 100000\r\n\r\n"
        connection.sendall(head.encode() + part)
        time.sleep(0.2)
    until(lambda: f"POST {path} 499" in caplog.text)
    time.sleep(0.2)
    assert "Traceback" not in caplog.text and not server.jobs()


def test_a_client_that_waits_long_hears_something(server, monkeypatch):
    import lance_mlx.serve.service as service

    monkeypatch.setattr(service, "SILENCE", 0.3)
    server.worker.model.pause = 0.5
    body = json.dumps({"prompt": "slow", "size": "16x16", "num_steps": 4}).encode()
    status, answer = raw(server, "POST", "/v1/images/generations", body, Content_Type="application/json")
    assert status == 200 and answer.startswith(b"  ") and json.loads(answer)["data"]
    body = json.dumps({"prompt": "slow", "size": "16x16", "num_steps": 4, "stream": True}).encode()
    status, answer = raw(server, "POST", "/v1/images/generations", body, Content_Type="application/json")
    assert status == 200 and b": denoising 3 of 4\n\n" in answer and b"image_generation.completed" in answer
    assert small(server.client(), "slow", steps=3).data


def test_where_one_stands_is_told(server):
    server.worker.model.pause = 0.3
    client = server.client()
    with pytest.warns(DeprecationWarning):
        videos = [client.videos.create(prompt="a", size="16x16", extra_body={"num_steps": 5}) for _ in range(3)]
        assert videos[2].detail == "in the queue, 2 before this one"
        for video in videos:
            client.videos.delete(video.id)


def test_what_the_model_stumbles_over_is_told_and_the_next_request_is_served(server, monkeypatch):
    def fail(*given, **named):
        raise MemoryError

    monkeypatch.setattr(server.worker.model, "generate_batch", fail)
    with pytest.raises(openai.InternalServerError, match="the model failed: MemoryError"):
        small(server.client(), "a")
    monkeypatch.undo()
    assert small(server.client(), "a").data and server.worker.model.released


HOSTILE = ["../../etc/passwd", "..\\..\\a.png", "/etc/passwd", "a\x00b", "%2e%2e%2f", "a" * 5000, "", ".", "🦜\n.png"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_uploads_lead_nowhere(server, picture, name):
    boundary = "x1y2z3"
    shown = name.replace("\n", "%0A").replace("\x00", "%00").replace('"', "%22")
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n'.encode(),
        f'--{boundary}\r\nContent-Disposition: form-data; name="num_steps"\r\n\r\n1\r\n'.encode(),
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{shown}"\r\n\r\n'.encode(),
        picture + f"\r\n--{boundary}--\r\n".encode(),
    ]
    before = set(server.root.rglob("*"))
    kind = f"multipart/form-data; boundary={boundary}"
    status, answer = raw(server, "POST", "/v1/images/edits", b"".join(parts), Content_Type=kind)
    # The header of a part may be too long.
    assert status == (400 if len(name) > 4000 else 200), answer
    assert str(server.root).encode() not in answer
    server.settle()
    assert set(server.root.rglob("*")) == before


def files(picture: bytes) -> dict[str, bytes]:
    """What pretends to be a picture or a video, by what is said of it."""
    # The header of a picture says how much it would take.
    head = b"IHDR" + (30000).to_bytes(4) * 2 + b"\x08\x02\x00\x00\x00"
    bomb = picture[:8] + (13).to_bytes(4) + head + zlib.crc32(head).to_bytes(4) + picture[33:]
    ribbon = io.BytesIO()
    Image.new("RGB", (2000, 16)).save(ribbon, "PNG")
    return {
        "in a format": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        "in a format that": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        "no image or video": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(/etc/passwd) (r) file\n",
        "in a format that is read": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "too many pixels": bomb,
        "crop it": ribbon.getvalue(),
        "may be damaged": picture[: len(picture) // 2],
        "is no video": b"\x00\x00\x00 ftypisom" + b"\x00" * 64,
    }


def test_files_that_pretend_are_refused_in_a_line(server, picture, data_url):
    for told, content in files(picture).items():
        body = {"prompt": "x", "num_steps": 1, "input_reference": {"image_url": data_url(content)}}
        status, answer = raw(server, "POST", "/v1/videos", json.dumps(body).encode(), Content_Type="application/json")
        message = json.loads(answer)["error"]["message"]
        assert status == 400 and told in message and "\n" not in message, (told, answer)
        assert "root:" not in message and str(server.root) not in message


def test_what_is_over_a_bound_is_refused(server, clip, data_url, monkeypatch):
    from lance_mlx.serve import uploads
    from lance_mlx.serve.bounds import Bounds

    def told(content: bytes) -> tuple[int, str]:
        body = {"prompt": "x", "video": {"image_url": data_url(content)}}
        status, answer = raw(
            server, "POST", "/v1/videos/edits", json.dumps(body).encode(), Content_Type="application/json"
        )
        return status, json.loads(answer)["error"]["message"]

    video = clip.read_bytes()
    for bounds, status, message in [
        (Bounds(upload_bytes=1000), 413, "a file may have at most"),
        (Bounds(frames=10), 400, "more than 10 frames"),
        (Bounds(frame_pixels=1000), 400, "too many pixels"),
    ]:
        monkeypatch.setattr(uploads, "BOUNDS", bounds)
        assert told(video)[0] == status and message in told(video)[1]
    too_long = str(200 << 20)
    status, answer = raw(server, "POST", "/v1/videos", b"{", Content_Type="application/json", Content_Length=too_long)
    assert status == 413 and json.loads(answer)["error"]["code"] == "too_large"
    chunked = b"2\r\n{}\r\n0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = "POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + chunked)
        assert connection.recv(100).startswith(b"HTTP/1.1 411")


PATHS = [
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file={root}/page/../../../../../../etc/passwd",
    "/gradio_api/file={root}/page/..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
    "/gradio_api/file=http://127.0.0.1:{port}/health",
    "/gradio_api/file=pyproject.toml",
    "/gradio_api/file=./README.md",
    "/gradio_api/file/etc/passwd",
    "/gradio_api/proxy=http://127.0.0.1:{port}/health",
    "/file=/etc/passwd",
    "/file/etc/passwd",
    "/static/../../../../../../../../etc/passwd",
    "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "/assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
    "/svelte/..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
    "/v1/videos/..%2f..%2fetc%2fpasswd/content",
    "/v1/videos/%2e%2e/content",
    "//etc/passwd",
    "/gradio_api/vibe-code/",
    "/gradio_api/component_server",
    "/gradio_api/openapi.json",
    "/monitoring",
    "/docs",
    "/openapi.json",
]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leads_to_a_file_of_the_machine(server, path):
    status, answer = raw(server, "GET", path.format(root=server.root, port=server.port))
    assert status in (400, 403, 404, 405), answer[:200]
    assert b"root:" not in answer and b"[project]" not in answer and b'"working"' not in answer


def test_the_page_takes_no_file_that_was_not_uploaded(server):
    for path in ("/etc/passwd", f"http://127.0.0.1:{server.port}/health", "\\u002fetc/passwd"):
        body = '{"data": ["t2i", [{"image": {"path": "%s", "meta": {"_type": "gradio.FileData"}}}]], "fn_index": 0}'
        status, answer = raw(
            server, "POST", "/gradio_api/queue/join", (body % path).encode(), Content_Type="application/json"
        )
        assert (status, json.loads(answer)["error"]["message"]) == (404, "there is no such file")


def test_other_sites_are_kept_out(server):
    body = json.dumps({"prompt": "x", "size": "16x16", "num_steps": 1}).encode()
    post = ("POST", "/v1/images/generations", body)
    here = f"127.0.0.1:{server.port}"
    assert raw(server, *post, Content_Type="application/json", Origin=f"http://{here}")[0] == 200
    assert raw(server, *post, Content_Type="application/json", Origin="https://example.com")[0] == 403
    assert raw(server, *post, Content_Type="application/json", Origin="null")[0] == 403
    assert raw(server, *post, Content_Type="text/plain")[0] == 415
    assert raw(server, "GET", "/health", Host="rebound.example.com")[0] == 403
    assert raw(server, "GET", "/health", Host=f"localhost:{server.port}")[0] == 200


def test_with_a_token_nothing_is_open_but_health(serving, tmp_path):
    with serving(Stub, tmp_path, token="s3cret") as server:
        for path in ("/", "/v1/models", "/gradio_api/info", "/config", "/gradio_api/heartbeat/a"):
            assert raw(server, "GET", path)[0] == 401
        assert raw(server, "GET", "/health")[0] == 200
        for scheme in ("Bearer wrong", "Bearer", "Basic !!!", "Basic czNjcmV0", "Digest s3cret", "Bearer \xe9"):
            assert raw(server, "GET", "/v1/models", Authorization=scheme)[0] == 401
        # The password s3cret of nobody in particular.
        assert raw(server, "GET", "/config", Authorization="Basic OnMzY3JldA==")[0] == 200
        assert [model.id for model in server.client().models.list()] == ["lance"]
        # As behind a proxy that has a name.
        assert raw(server, "GET", "/v1/models", Authorization="Bearer s3cret", Host="lance.example.com")[0] == 200
        with pytest.raises(openai.AuthenticationError, match="a token is needed"):
            server.client(api_key="wrong").models.list()


def test_an_idle_model_is_let_go_and_comes_back(serving, tmp_path, until):
    with serving(Stub, tmp_path, idle=0.2) as server:
        until(lambda: server.worker.model.released)
        assert small(server.client(), "a").data


def test_only_so_many_finished_videos_are_kept(server, monkeypatch):
    from lance_mlx.serve import videos
    from lance_mlx.serve.bounds import Bounds

    monkeypatch.setattr(videos, "BOUNDS", Bounds(kept=3))
    client = server.client()
    with pytest.warns(DeprecationWarning):
        for number in range(6):
            video = client.videos.create(prompt=str(number), size="16x16", extra_body={"num_steps": 1})
            while client.videos.retrieve(video.id).status != "completed":
                time.sleep(0.02)
        kept = list(client.videos.list())
        assert [video.prompt for video in kept] == ["5", "4", "3"] and len(server.jobs()) == 3
        for video in kept:
            client.videos.delete(video.id)


def test_memory_stays_where_it_was(server, picture, data_url):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    if not Path("/proc/self/statm").exists():
        pytest.skip("there is no /proc to read the memory from")
    noise = np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    url, sizes = data_url(file.getvalue()), []
    for _ in itertools.repeat(None, 12):
        ask(server.client(), url, "what")
        sizes.append(resident())
    assert sizes[-1] - sizes[3] < 64 << 20
