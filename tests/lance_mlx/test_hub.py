"""Models by their name on the hub: what is fetched, what is kept, and what is said when that fails."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lance_mlx.checkpoint.hub import is_repository
from lance_mlx.media.write import read_metadata

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "somebody/Lance"


class Hub(ThreadingHTTPServer):
    """As much of the hub's protocol as fetching a repository needs: its commit, its files, and each file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.fetched = folder, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        folder, path = self.server.folder, self.path.split("?")[0]
        if path == f"/api/models/{REPOSITORY}/revision/main":
            self.send({}, json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": []}).encode(), body)
        elif path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
            files = [file for file in folder.rglob("*") if file.is_file()]
            entries = [
                {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": etag(f)}
                for f in files
            ]
            self.send({}, json.dumps(entries).encode(), body)
        elif path.startswith(f"/{REPOSITORY}/resolve/{COMMIT}/"):
            file = folder / path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/")
            if body:
                self.server.fetched.append(str(file.relative_to(folder)))
            self.send({"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT}, file.read_bytes(), body)
        else:
            self.send({"X-Error-Code": "RepoNotFound"}, b"", body, status=404)

    def send(self, headers: dict[str, str], content: bytes, body: bool, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def etag(file: Path) -> str:
    return f"{abs(hash(str(file))):040x}"[-40:]


@pytest.fixture
def hub(checkpoint):
    """A hub whose one repository is the small official checkpoint."""
    server = Hub(checkpoint)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


SMALL = ["--prompt", "a bird", "--width", 32, "--height", 32, "--steps", 2, "-Q", "-o"]


def test_only_what_the_variant_needs_is_fetched_and_then_kept(run, refused, hub, checkpoint, tmp_path):
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = run("generate", "t2i", "--model", REPOSITORY, *SMALL, tmp_path / "hub.png", **here)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    names = {"vocab.json", "merges.txt", "tokenizer_config.json", "llm_config.json", "model.safetensors"}
    vit = {"Qwen2.5-VL-ViT/config.json", "Qwen2.5-VL-ViT/vit.safetensors"}
    assert sorted(hub.fetched) == sorted({f"Lance_3B/{name}" for name in names} | vit | {"Wan2.2_VAE.pth"})
    done = run("generate", "t2i", "--model", checkpoint, *SMALL, tmp_path / "folder.png")
    drawn = [np.asarray(Image.open(tmp_path / name)) for name in ("hub.png", "folder.png")]
    assert np.array_equal(*drawn)
    assert read_metadata(tmp_path / "hub.png")["model"] == REPOSITORY

    offline = here | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run("generate", "t2i", "--model", REPOSITORY, *SMALL, tmp_path / "offline.png", **offline)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "offline.png").read_bytes() == (tmp_path / "hub.png").read_bytes()
    line = refused("generate", "t2v", "--model", REPOSITORY, *SMALL, tmp_path / "a.mp4", **offline)
    assert f"does not hold all of {REPOSITORY} that Lance_3B_Video needs: connect or give a folder" in line

    line = refused("convert", REPOSITORY, tmp_path / "out", **here)
    assert "choose one with --variant" in line
    hub.fetched.clear()
    done = run("convert", REPOSITORY, tmp_path / "out", "--variant", "image", **here)
    assert done.returncode == 0, done.stderr
    assert hub.fetched == []
    assert json.loads((tmp_path / "out" / "conversion_report.json").read_text())["source"] == REPOSITORY


def test_an_unknown_repository_is_one_line(refused, hub, tmp_path):
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    line = refused("generate", "t2i", "--model", "nobody/nothing", *SMALL, tmp_path / "a.png", **here)
    assert "'nobody/nothing' is neither a folder nor a repository that the hub shows" in line


def test_a_folder_comes_before_a_repository_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_repository("somebody/Lance-3B_v1.0")
    (tmp_path / "somebody" / "Lance-3B_v1.0").mkdir(parents=True)
    assert not is_repository("somebody/Lance-3B_v1.0")
    assert not any(is_repository(name) for name in ("Lance", "./a/b", "/a/b", "a/b/c", "a/"))
