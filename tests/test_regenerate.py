"""Fixtures that the project makes are what their builders make, and what differs is named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import regenerate_oracles

from parity.lance.record import record
from parity.lance.record_options import Options, build_request
from parity.tensors.recording import Tap, read_tensors, write_tensors

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
ORACLES = ROOT / "oracles"


@pytest.fixture
def stored(tmp_path):
    """A repository with embedded oracles and a recorded bundle among them."""
    root = tmp_path / "repository"
    for name in ("checkpoint-a", "media", "t2i-fp32-nokv"):
        shutil.copytree(ORACLES / name, root / "oracles" / name)
    options = Options(
        question="what", images=(root / "oracles" / "media" / "garden.png",), vit_resolution=56, max_new_tokens=2
    )
    record(root / "oracles" / "own", root / "oracles" / "checkpoint-a", build_request("x2t_image", options))
    return root


def run(*names):
    command = [sys.executable, SCRIPTS / "regenerate_oracles.py", *names]
    return subprocess.run(command, capture_output=True, text=True)


def test_what_is_stored_is_what_is_made():
    for fixture in regenerate_oracles.FIXTURES:
        if fixture.name in ("selection", "tokenizer", "recorded"):
            try:
                _, lines = regenerate_oracles.regenerate(fixture, ROOT)
            except regenerate_oracles.Skipped as reason:
                assert "not here" in str(reason)
            else:
                assert lines == []


def test_without_the_captured_oracles_fixtures_are_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr(regenerate_oracles, "SHARED", tmp_path)
    for name in ("selection", "tokenizer"):
        fixture = next(fixture for fixture in regenerate_oracles.FIXTURES if fixture.name == name)
        with pytest.raises(regenerate_oracles.Skipped, match="not here"):
            regenerate_oracles.regenerate(fixture, ROOT)


def test_recorded_bundles_are_made_again_byte_for_byte(stored):
    fixture = next(fixture for fixture in regenerate_oracles.FIXTURES if fixture.name == "recorded")
    bundle = Path("oracles") / "own"
    names = {bundle / name for name in ("manifest.json", "inputs.safetensors", "taps.safetensors")}
    paths, lines = regenerate_oracles.regenerate(fixture, stored)
    assert (set(paths), lines) == (names, [])
    # The commit and version tell when it was recorded, and are no part of what is compared.
    manifest = stored / bundle / "manifest.json"
    document = json.loads(manifest.read_text(encoding="utf-8"))
    document["source"]["commit"] = "0" * 40
    manifest.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    assert regenerate_oracles.regenerate(fixture, stored)[1] == []
    taps = read_tensors(stored / bundle / "taps.safetensors")
    taps["tokens"] = Tap(taps["tokens"].array + np.int32(1), "int32")
    write_tensors(stored / bundle / "taps.safetensors", taps)
    document["request"]["text_template"] = True
    document["checkpoint"] = "checkpoint-a"
    document["name"] = "other"
    manifest.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    lines = regenerate_oracles.regenerate(fixture, stored)[1]
    assert any(line.endswith("taps.safetensors differs: 1 of 29 tensors, such as tokens") or "tokens" in line
               for line in lines)  # fmt: skip
    assert any('manifest.json differs: name is "other", made is "own"' in line for line in lines)


@pytest.mark.parametrize(
    ("name", "made", "old", "why"),
    [
        ("a.txt", b"same", None, "is not stored"),
        ("a.txt", b"abcd", b"abXde", "from byte 2 on; 5 bytes stored, 4 made"),
        ("a.json", b'{"a": [1, {"b": 2}]}', b'{"a": [1, {"b": 3}]}', "a[1].b is 3, made is 2"),
        ("a.json", b'{"a": 1}', b'{"a": 1, "b": 2}', "b is 2, made is null"),
        ("a.json", b'{"a": 1}', b'{ "a": 1}', "from byte 1 on"),
        ("a.json", b'{"a": 1}', b"{", "from byte 1 on"),
        ("a.safetensors", b"x", b"y", "from byte 0 on"),
    ],
)
def test_differences_are_named(tmp_path, name, made, old, why):
    for place, data in (("made", made), ("stored", old)):
        if data is not None:
            (tmp_path / place).write_bytes(data)
    (line,) = regenerate_oracles.differences(tmp_path / "made", tmp_path / "stored", Path(name))
    assert why in line and line.startswith(name)
    (tmp_path / "stored").write_bytes(made)
    assert list(regenerate_oracles.differences(tmp_path / "made", tmp_path / "stored", Path(name))) == []


def test_tensors_that_differ_are_named(tmp_path):
    one, two = Tap(np.ones(3, np.float32), "float32"), Tap(np.zeros(3, np.float32), "bfloat16")
    write_tensors(tmp_path / "made", {"a": one, "b": two})
    for taps, why in (({"a": one, "b": one}, "1 of 2 tensors, such as b"), ({"a": one}, "1 tensors on one side only")):
        write_tensors(tmp_path / "stored", taps)
        (line,) = regenerate_oracles.differences(tmp_path / "made", tmp_path / "stored", Path("x.safetensors"))
        assert why in line


def test_embedding_keeps_and_lists_what_the_project_adds(tmp_path, monkeypatch):
    embed = regenerate_oracles.embed_oracles
    monkeypatch.setattr(embed, "MAX_BYTES", 10**9)
    dest = tmp_path / "oracles"
    embed.embed(ORACLES, dest)
    request = build_request("t2i", Options(prompt="a bird", width=32, height=32, steps=1))
    record(dest / "own", dest / "checkpoint-a", request, dtype="float32")
    (dest / "t2i-fp32-kv" / "floors.json").write_text("{}")
    (dest / "x2t_video-fp32-kv").mkdir()
    (dest / "x2t_video-fp32-kv" / "floors.json").write_text("{}")
    manifest = embed.embed(ORACLES, dest)
    files = {path.relative_to(dest).as_posix() for path in dest.rglob("*") if path.is_file()}
    assert files == set(manifest["files"]) | {"MANIFEST.json"}
    assert {"own/taps.safetensors", "own/manifest.json", "t2i-fp32-kv/floors.json"} <= files
    assert not (dest / "x2t_video-fp32-kv").exists()


def test_the_command_refuses_unknown_names():
    done = run("everything")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'everything' is not one of" in done.stderr
