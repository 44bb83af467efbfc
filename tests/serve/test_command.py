"""`lance-mlx serve`, as a user starts and ends it."""

import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

openai = pytest.importorskip("openai", reason="the client of the API: pip install '.[test]'")
pytest.importorskip("gradio", reason="the server needs its extra: pip install '.[serve,test]'")
CHECKPOINT = Path(__file__).parents[2] / "oracles" / "checkpoint-a"
COMMAND = [sys.executable, "-c", "import lance_mlx.cli.main as command; command.main()", "serve"]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def started(tmp_path, *options: str, **environment: str):
    """The command at work: its process, its address, and where it keeps its files."""
    port = free_port()
    command = [*COMMAND, "--model", str(CHECKPOINT), "--port", str(port), *options]
    files = tmp_path / "files"
    files.mkdir()
    with (tmp_path / "log").open("w") as log:
        environment = os.environ | {"TMPDIR": str(files), "LANCE_MLX_TOKEN": ""} | environment
        process = subprocess.Popen(command, stderr=log, stdout=log, env=environment)
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"{address}/health").close()
                break
            except OSError:
                time.sleep(0.1)
        yield process, address, files
    finally:
        process.kill()
        process.wait()


def post(address: str, path: str, body: dict, **headers: str):
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json"} | headers
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_it_serves_writes_a_line_a_request_and_ends_cleanly(tmp_path):
    with started(tmp_path, "--idle-minutes", "0.01") as (process, address, files):
        for _ in range(2):
            # The second time the model has been let go.
            made = post(address, "/v1/images/generations", {"prompt": "a bird", "size": "32x32", "num_steps": 1})
            assert made["data"][0]["b64_json"]
            time.sleep(1.5)
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(address, "/v1/images/generations", {"prompt": "x", "size": "1x1"})
        assert refused.value.code == 400
        # One in progress, and a page that is open.
        post(address, "/v1/videos", {"prompt": "a bird", "size": "96x96", "num_steps": 200})
        page = urllib.request.urlopen(f"{address}/gradio_api/heartbeat/abc")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        page.close()
        assert list(files.iterdir()) == []
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log and log.rstrip().endswith("ended")
    lines = [line for line in log.splitlines() if " POST " in line]
    assert [re.search(r"POST (\S+) (\d+) \d+\.\d\d s$", line).groups() for line in lines] == [
        ("/v1/images/generations", "200"),
        ("/v1/images/generations", "200"),
        ("/v1/images/generations", "400"),
        ("/v1/videos", "200"),
    ]


def test_a_client_that_asks_every_few_seconds_keeps_its_connection(tmp_path):
    with started(tmp_path) as (_, address, _files):
        connection = http.client.HTTPConnection(address.removeprefix("http://"))
        connection.request("GET", "/health")
        connection.getresponse().read()
        kept = connection.sock
        # uvicorn's own limit, and that of OpenAI's client, are 5.
        time.sleep(6)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200 and connection.sock is kept


def test_it_ends_cleanly_when_it_is_told_to(tmp_path):
    with started(tmp_path) as (process, _, files):
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert list(files.iterdir()) == []


def test_stored_pixels_are_taken_when_asked_for(tmp_path):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (96, 64)).save(file, "PNG", exif=exif)
    with started(tmp_path, "--as-upstream") as (_, address, _files):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        values = {"num_steps": 1, "resolution": "image_256res"}
        made = client.images.edit(image=("a.png", file.getvalue()), prompt="make it blue", extra_body=values)
    assert made.size == "304x224"


def test_a_token_comes_from_the_environment(tmp_path):
    with started(tmp_path, LANCE_MLX_TOKEN="s3cret") as (_, address, _files):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/v1/models")
        assert refused.value.code == 401
        asked = urllib.request.Request(f"{address}/v1/models", headers={"Authorization": "Bearer s3cret"})
        assert json.load(urllib.request.urlopen(asked))["data"][0]["id"] == "lance"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model", str(CHECKPOINT), "--host", "0.0.0.0"], "0.0.0.0 can be reached by others: choose a --token"),
        (["--model", str(CHECKPOINT), "--host", "::"], "can be reached by others"),
        (["--model", str(CHECKPOINT), "--token", "a b\n"], "the token must be printable"),
        (["--model", str(CHECKPOINT), "--host", "nowhere.invalid", "--token", "x"], "choose another --host"),
        (["--model", "nowhere"], "model folder nowhere does not exist"),
    ],
)
def test_what_is_not_safe_or_not_there_is_refused(options, told):
    environment = {name: value for name, value in os.environ.items() if name != "LANCE_MLX_TOKEN"}
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_said(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        options = ["--model", str(CHECKPOINT), "--port", str(taken.getsockname()[1])]
        done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "choose another --port" in done.stderr and "Traceback" not in done.stderr


def test_without_the_extra_it_says_what_to_install():
    script = f"""
import sys
sys.modules["fastapi"] = None
sys.argv = ["lance-mlx", "serve", "--model", {str(CHECKPOINT)!r}]
import lance_mlx.cli.main as command
command.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "pip install '.[serve]' in the checkout" in done.stderr


@pytest.mark.exhaustive
def test_many_clients_lose_nothing_and_read_nothing():
    script = Path(__file__).parents[2] / "scripts" / "serve_load.py"
    done = subprocess.run([sys.executable, script, "--requests", "14"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 14 requests, 8 at once | 14 answered |" in done.stdout
