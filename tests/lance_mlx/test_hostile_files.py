"""Files of a checkpoint that are not what they should be: one line each, and none that is waited for."""

import json
import os
import struct
import zipfile

import pytest

from lance_mlx import LanceError
from lance_mlx.checkpoint.convert import convert_vae
from lance_mlx.checkpoint.pth import check_pth
from lance_mlx.requests.files import read_requests
from lance_mlx.sequence.tokenizer import LanceTokenizer

DEEP = "[" * 100_000
DRAWING = ["generate", "t2i", "--prompt", "a", "-o", "a.png", "--model"]


@pytest.mark.parametrize("name", ["llm_config.json", "tokenizer_config.json", "vocab.json"])
def test_json_that_is_nested_too_deeply_is_one_line(refused, checkpoint_copy, name):
    (checkpoint_copy.variant / name).write_text(DEEP)
    line = refused(*DRAWING, checkpoint_copy.path)
    assert name in line or "tokenizer files in" in line


@pytest.mark.parametrize(
    "entry",
    [{"content": ["a"], "special": True}, {"content": 3, "special": True}, {"content": "a", "special": "yes"},
     {"content": None, "special": True}, ["a"], "a", None],
)  # fmt: skip
def test_a_wrong_type_in_a_tokenizer_file_is_one_line(checkpoint_copy, entry):
    path = checkpoint_copy.variant / "tokenizer_config.json"
    values = json.loads(path.read_text())
    for added in ({**values["added_tokens_decoder"], "500": entry}, [entry], entry):
        path.write_text(json.dumps(values | {"added_tokens_decoder": added}))
        with pytest.raises(LanceError, match="tokenizer"):
            LanceTokenizer(checkpoint_copy.variant)
    path.write_text(json.dumps([values]))
    with pytest.raises(LanceError, match="tokenizer files in"):
        LanceTokenizer(checkpoint_copy.variant)


@pytest.mark.parametrize(
    "name",
    ["Lance_3B/llm_config.json", "Lance_3B/model.safetensors", "Lance_3B/tokenizer_config.json", "Wan2.2_VAE.pth"],
)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(refused, checkpoint_copy, name):
    path = checkpoint_copy.path / name
    path.unlink()
    os.mkfifo(path)
    line = refused(*DRAWING, checkpoint_copy.path)
    assert "pipe" in line or "is missing" in line or "no Wan2.2_VAE" in line


def test_pipes_and_devices_among_the_arguments_are_not_waited_for(refused, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.png")
    os.mkfifo("pipe.pth")
    given = ["--model", checkpoint, "--prompt", "a"]
    assert "pipe" in refused("generate", "--model", checkpoint, "--config-from", "pipe.png")
    assert "pipe" in refused("generate", "--model", checkpoint, "--requests", "pipe.png")
    assert "is not a file" in refused("generate", "i2v", *given, "--image", "pipe.png")
    assert "pipe" in refused("convert-vae", "pipe.pth", "vae.safetensors")
    answering = ["generate", "x2t_image", "--model", checkpoint, "--image", "pipe.png", "-o", "/dev/null"]
    assert "pipe" in refused(*answering, "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe.png", "pipe.pth"]


@pytest.mark.parametrize("length", [300, 5000])
@pytest.mark.parametrize(
    "command",
    [
        ["info", "--model"],
        ["convert"],
        ["generate", "x2t_image", "--model", "{model}", "--image"],
        ["generate", "t2i", "--model", "{model}", "--prompt", "a", "--noise"],
    ],
)
def test_a_name_that_no_disk_takes_is_one_line(refused, checkpoint, tmp_path, command, length):
    given = [str(checkpoint) if word == "{model}" else word for word in command] + ["a" * length]
    line = refused(*given, *([tmp_path / "out"] if command == ["convert"] else []))
    assert line.endswith("a cannot be used: File name too long")


def test_an_index_with_something_else_than_names_is_one_line(invoke, refused, checkpoint, tmp_path):
    assert invoke("convert", checkpoint, tmp_path / "out", "--variant", "image", "-Q").returncode == 0
    path = tmp_path / "out" / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": ["b"]}}))
    assert "has no weight_map" in refused(*DRAWING, tmp_path / "out")


def test_a_request_file_of_any_encoding_or_depth_is_one_line(tmp_path):
    path = tmp_path / "requests.json"
    for text in (DEEP.encode(), b"\xff\xfe", b'{"a": "\xff"}'):
        path.write_bytes(text)
        with pytest.raises(LanceError, match="is not readable JSON"):
            read_requests(path)


def test_a_vae_that_is_not_what_its_checksums_say_is_not_converted(checkpoint_copy, refused, tmp_path):
    path = checkpoint_copy.path / "Wan2.2_VAE.pth"
    check_pth(path)
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda member: member.file_size)
    with path.open("r+b") as file:
        file.seek(member.header_offset + 26)
        skipped = sum(struct.unpack("<HH", file.read(4)))
        file.seek(member.header_offset + 30 + skipped + 8)
        file.write(b"\x00\x00\x80\x3f")
    with pytest.raises(LanceError, match="Bad CRC-32"):
        convert_vae(path, tmp_path / "vae.safetensors")
    assert "Bad CRC-32" in refused("convert", checkpoint_copy.path, tmp_path / "out")
    assert not list(tmp_path.glob("*.safetensors")) and not (tmp_path / "out").exists()
