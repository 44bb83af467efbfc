"""Prompt rewriting against a small server on this machine."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from lance_mlx import LanceError
from lance_mlx.media.write import read_metadata
from lance_mlx.requests.rewriting import Rewriter

KEY = "secret-key"


class Endpoint(ThreadingHTTPServer):
    """Answers every request with one status and body, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.body, self.headers = 200, b"", {}
        self.asked: list[dict] = []
        self.delay = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def says(self, text: str) -> None:
        self.body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        asked = {"path": self.path, "key": self.headers["Authorization"], "body": json.loads(body)}
        self.server.asked.append(asked)
        if self.server.status == 0:
            self.server.delay.wait(5)
            return
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[Endpoint]:
    """A running endpoint that rewrites everything as "a detailed bird"."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Endpoint() as server:
        server.says(" a detailed bird\n")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.delay.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def environment(endpoint) -> dict[str, str]:
    """The variables that lead to the endpoint."""
    return {
        "LANCE_REWRITE_API_KEY": KEY,
        "LANCE_REWRITE_MODEL_NAME": "writer",
        "LANCE_REWRITE_BASE_URL": f"{endpoint.url}/",
    }


def test_a_prompt_is_sent_and_its_rewriting_comes_back(endpoint, environment):
    assert Rewriter.from_environment(environment).rewrite(" a bird ") == "a detailed bird"
    (asked,) = endpoint.asked
    assert (asked["path"], asked["key"]) == ("/v1/chat/completions", f"Bearer {KEY}")
    body = asked["body"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("writer", 0.3, 2048)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][1]["content"] == [{"type": "text", "text": "a bird"}]


def sent_image(endpoint) -> Image.Image:
    kind, encoded = endpoint.asked[0]["body"]["messages"][1]["content"][1]["image_url"]["url"].split(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


@pytest.mark.parametrize(("as_upstream", "size"), [(False, (64, 96)), (True, (96, 64))])
def test_the_image_goes_along_as_the_model_sees_it(endpoint, environment, media, as_upstream, size):
    Rewriter.from_environment(environment).rewrite("it flies", media / "phone.jpg", as_upstream)
    assert endpoint.asked[0]["body"]["messages"][1]["content"][0]["text"] == "it flies"
    assert sent_image(endpoint).size == size


@pytest.mark.parametrize(
    ("status", "body", "line"),
    [
        (401, json.dumps({"error": {"message": f"bad key\n{KEY}"}}).encode(), "status 401: bad key ***"),
        (500, b"<html>", "answered with status 500"),
        (302, b"", "answered with status 302"),
        (200, b"<html>", "did not answer with JSON"),
        (200, b"{}", "answered without choices"),
        (200, b'{"choices": [{"message": {"content": null}}]}', "answered without choices"),
        (200, b'{"choices": [{"message": {"content": " "}}]}', "answered with an empty text"),
    ],
)
def test_an_unusable_answer_is_one_line_without_the_key(endpoint, environment, status, body, line):
    endpoint.status, endpoint.body = status, body
    endpoint.headers = {"Location": f"{endpoint.url}/elsewhere"} if status == 302 else {}
    with pytest.raises(LanceError) as error:
        Rewriter.from_environment(environment).rewrite("a bird")
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert KEY not in str(error.value)
    # A redirect is not followed: it would hand the key on.
    assert len(endpoint.asked) == 1


def test_silence_ends_and_nobody_there_is_told(endpoint):
    endpoint.status = 0
    with pytest.raises(LanceError, match="cannot be reached"):
        Rewriter(KEY, "writer", endpoint.url, timeout=0.2).rewrite("a bird")
    with pytest.raises(LanceError, match="cannot be reached"):
        Rewriter(KEY, "writer", "http://127.0.0.1:9/v1").rewrite("a bird")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"LANCE_REWRITE_API_KEY": ""}, "LANCE_REWRITE_API_KEY, which is not set"),
        ({"LANCE_REWRITE_MODEL_NAME": " "}, "LANCE_REWRITE_MODEL_NAME, which is not set"),
        ({"LANCE_REWRITE_BASE_URL": "file:///etc/passwd"}, "must begin with http"),
        ({"LANCE_REWRITE_API_KEY": "a\nb"}, "plain ASCII"),
    ],
)
def test_a_missing_or_odd_variable_is_named(environment, values, line):
    with pytest.raises(LanceError, match=line):
        Rewriter.from_environment(environment | values)


def test_an_empty_prompt_is_not_sent(endpoint, environment):
    with pytest.raises(LanceError, match="empty prompt"):
        Rewriter.from_environment(environment).rewrite(" ")
    assert endpoint.asked == []


def test_the_address_is_openais_unless_another_is_set(environment):
    del environment["LANCE_REWRITE_BASE_URL"]
    assert Rewriter.from_environment(environment).base_url == "https://api.openai.com/v1"


SMALL = ["--width", 48, "--height", 32, "--num-frames", 5, "--steps", 1]


def test_the_command_draws_the_rewritten_prompt(run, endpoint, environment, checkpoint, tmp_path):
    output = tmp_path / "a.mp4"
    given = ["--model", checkpoint, "--prompt", "a bird", "-o", output, *SMALL]
    done = run("generate", "t2v", *given, "--rewrite", **environment)
    assert done.returncode == 0, done.stderr
    metadata = read_metadata(output)
    assert metadata["request"]["prompt"] == "a detailed bird"
    assert metadata["prompt_before_rewriting"] == "a bird"


def test_the_command_says_so_and_goes_on_where_rewriting_fails(run, endpoint, environment, checkpoint, media, tmp_path):
    endpoint.status = 503
    output = tmp_path / "a.mp4"
    given = ["--model", checkpoint, "--image", media / "phone.jpg", "--prompt", "it flies", "-o", output]
    small = ["--num-frames", 5, "--steps", 1, "--vae-resolution", 64, "-Q", "--as-upstream"]
    done = run("generate", "i2v", *given, *small, "--rewrite", **environment)
    assert done.returncode == 0
    assert "the prompt is not rewritten: " in done.stderr
    assert "answered with status 503" in done.stderr
    assert sent_image(endpoint).size == (96, 64)
    assert read_metadata(output)["request"]["prompt"] == "it flies"


def test_a_request_file_is_rewritten_and_still_found_again(run, endpoint, environment, checkpoint, tmp_path):
    path = tmp_path / "t2v_example.json"
    path.write_text(json.dumps({"000001.mp4": "a bird"}), encoding="utf-8")
    given = ["generate", "--requests", path, "--model", checkpoint, "-o", tmp_path / "results", *SMALL, "--rewrite"]
    for _ in range(2):
        assert run(*given, **environment).returncode == 0
    assert len(endpoint.asked) == 1
    prompts = json.loads((tmp_path / "results" / "prompt.json").read_text(encoding="utf-8"))
    assert prompts == {"000001.mp4": "a detailed bird"}


def test_rewriting_without_an_endpoint_is_refused_before_anything_is_read(refused, tmp_path):
    line = refused("generate", "t2v", "--model", tmp_path, "--prompt", "a", "--rewrite", LANCE_REWRITE_API_KEY="")
    assert "rewriting needs LANCE_REWRITE_API_KEY" in line
