"""The embedded oracles are whole, and the script that selects them refuses what would damage a folder."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORACLES = ROOT / "oracles"
SCRIPT = ROOT / "scripts" / "embed_oracles.py"


def embed(source: Path, dest: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, source, dest], capture_output=True, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_embedded_files_are_those_of_the_manifest():
    manifest = json.loads((ORACLES / "MANIFEST.json").read_text(encoding="utf-8"))
    files = contents(ORACLES)
    assert manifest["format"] == "lance-oracles/1"
    assert set(files) == set(manifest["files"]) | {"MANIFEST.json", "README.md"}
    for name, entry in manifest["files"].items():
        assert entry == {"sha256": hashlib.sha256(files[name]).hexdigest(), "bytes": len(files[name])}, name
    assert sum(len(data) for data in files.values()) <= 15_000_000


def test_embedding_again_gives_the_same_and_drops_what_is_no_longer_selected(tmp_path):
    assert embed(ORACLES, tmp_path / "dest").returncode == 0
    (tmp_path / "dest" / "earlier").mkdir()
    (tmp_path / "dest" / "earlier" / "taps.safetensors").write_bytes(b"")
    assert embed(ORACLES, tmp_path / "dest").returncode == 0
    expected = contents(ORACLES)
    del expected["README.md"]
    assert contents(tmp_path / "dest") == expected


@pytest.mark.parametrize(
    ("source", "dest", "message"),
    [
        ("empty", "dest", "is missing; SOURCE must be a full set of oracles"),
        (ORACLES, "foreign", "is not empty and holds no MANIFEST.json"),
        (ORACLES, ORACLES, "the same folder"),
    ],
)
def test_bad_folders_are_refused_untouched(tmp_path, source, dest, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("keep me")
    before = contents(tmp_path)
    result = embed(tmp_path / source, tmp_path / dest)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert contents(tmp_path) == before
