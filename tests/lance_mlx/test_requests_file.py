"""Upstream's request files: their forms, the task that they tell, and the line that each bad one gets."""

import json
from pathlib import Path

import pytest

from lance_mlx import LanceError, Task, Visual, VisualKind
from lance_mlx.requests.files import read_requests


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder that holds a.png, b.png and a.mp4; the readers look for files, not into them."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "a.mp4"):
        (tmp_path / name).touch()
    return tmp_path


def entry(*elements: object, targets: list[int] | None = None) -> dict[str, list]:
    """An entry of the elements; paths are told from texts by their suffix."""
    dtypes = ["text" if isinstance(e, list) or "." not in e else "video" if "mp4" in e else "image" for e in elements]
    targets = targets or [int(isinstance(element, list)) for element in elements]
    return {"interleave_array": list(elements), "element_dtype_array": dtypes, "istarget_in_interleave": targets}


ASKED = ["Look at it.", "what is it", "a bird"]


def write(values: object, name: str = "requests.json") -> Path:
    path = Path(name)
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "values", "task"),
    [
        ("a.json", {"000000.png": "a bird"}, Task.T2I),
        ("a.json", {"000000.mp4": "a bird"}, Task.T2V),
        ("t2v_example.json", {"0": "a bird"}, Task.T2V),
        ("i2v_example.json", {"0001": entry("it flies", "a.png")}, Task.I2V),
        ("image_edit_example.json", {"0001": entry("make it blue", "a.png")}, Task.IMAGE_EDIT),
        ("my_idip.json", {"0001": entry("it flies", "a.png")}, Task.SUBJECT),
        ("subject.json", {"0001": entry("both", "a.png", "b.png")}, Task.SUBJECT),
        ("a.json", {"0001": entry("make it blue", "a.mp4")}, Task.VIDEO_EDIT),
        ("image_edit.json", {"0001": entry("blue", "a.png", "b.png", targets=[0, 0, 1])}, Task.IMAGE_EDIT),
        ("a.json", {"0001": entry("a.png", ASKED)}, Task.X2T_IMAGE),
        ("i2v.json", {"0001": entry("a.mp4", ASKED)}, Task.X2T_VIDEO),
    ],
)
def test_the_entries_or_the_name_of_the_file_tell_the_task(name, values, task):
    assert read_requests(write(values, name)).task is task


def test_outputs_are_named_as_upstream_names_them():
    read = read_requests(write({"000000.png": "a", "12.png": "b", "00008": "c", "1234567.png": "d"}), Task.T2I)
    assert [item.name for item in read.items] == ["000000", "000012", "000008", "1234567"]
    assert [item.text for item in read.items] == ["a", "b", "c", "d"]


def test_an_edit_has_its_prompt_and_its_source():
    values = entry("make it blue", "a.png", "b.png", targets=[0, 0, 1]) | {"additional_info": {}}
    (item,) = read_requests(write({"0007": values}), Task.IMAGE_EDIT).items
    assert item.text == "make it blue"
    # The target is what upstream was trained to draw: no input.
    assert item.visuals == (Visual("a.png", VisualKind.IMAGE),)
    assert item.vision_type == "image"
    (item,) = read_requests(write({"0007": entry("a.png", "make it blue", targets=[0, 0])}), Task.IMAGE_EDIT).items
    # As upstream, whose instruction then speaks of the input "text".
    assert item.vision_type == "text"


def test_a_question_has_its_instruction_its_words_and_the_expected_answer():
    values = {"0001": entry("a.png", "b.png", ASKED), "0002": entry("a.png", "a nice bird", targets=[0, 1])}
    asked, described = read_requests(write(values)).items
    assert (asked.instruction, asked.text, asked.answer) == tuple(ASKED)
    assert asked.written == ("a.png", "b.png")
    assert (described.text, described.answer) == ("", "a nice bird")
    assert described.instruction.startswith("Generate a detailed and accurate description of the image")


def test_visuals_are_found_beside_the_file_and_above_it(folder, monkeypatch):
    examples = folder / "config" / "examples"
    (examples / "images").mkdir(parents=True)
    (examples / "images" / "c.png").touch()
    written = ["images/c.png", "config/examples/images/c.png", str(examples / "images" / "c.png")]
    path = write({str(number): entry("it moves", name) for number, name in enumerate(written)}, examples / "i2v.json")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    for item in read_requests(path).items:
        assert Path(item.visuals[0].path).samefile(examples / "images" / "c.png")


def without(key: str) -> dict[str, list]:
    return {name: value for name, value in entry("make it blue", "a.png").items() if name != key}


@pytest.mark.parametrize(
    ("values", "task", "line"),
    [
        ("{", None, "is not readable JSON"),
        ("[1]", None, "must hold a JSON object"),
        ("{}", None, "holds no entries"),
        ('{"1.png": "a", "1.png": "b"}', None, "the key '1.png' stands there twice"),
        ({"1.png": "a", "0001": "b"}, Task.T2I, "entries '1.png' and '0001' would both be written as 000001"),
        ({"cat.png": "a"}, None, "entry 'cat.png': its name must be a number"),
        ({"../1.png": "a"}, None, "its name must be a number"),
        ({"1.png": ["a"]}, Task.T2I, "task t2i needs a prompt, not an array"),
        ({"1.png": "a", "2.mp4": "b"}, None, "entry '1.png' is for t2i, but '2.mp4' for t2v"),
        ({"1": "a"}, None, "the entries fit t2i or t2v: name the task"),
        ({"1": entry("a", "a.png")}, None, "the entries fit i2v or image_edit or subject: name the task"),
        (
            {"1": None},
            None,
            "a prompt or an object with interleave_array, element_dtype_array, istarget_in_interleave is",
        ),
        ({"1": "a"}, Task.X2T_IMAGE, "task x2t_image needs an object with interleave_array, element_dtype_array"),
        ({"1": without("interleave_array")}, Task.IMAGE_EDIT, "the key 'interleave_array' is missing"),
        ({"1": without("element_dtype_array")}, None, "the key 'element_dtype_array' is missing"),
        ({"1": without("istarget_in_interleave")}, Task.IMAGE_EDIT, "the key 'istarget_in_interleave' is missing"),
        ({"1": entry("a", "a.png") | {"interleave_array": "a"}}, Task.I2V, "must be an array, not a string"),
        ({"1": entry("a", "a.png") | {"istarget_in_interleave": [0]}}, Task.I2V, "must be of one length"),
        ({"1": entry("a", "a.png") | {"element_dtype_array": ["text", "audio"]}}, Task.I2V, "unknown dtype 'audio'"),
        ({"1": entry("a", "a.png") | {"element_dtype_array": ["text", []]}}, Task.I2V, "unknown dtype []"),
        ({"1": entry("a", "a.png", targets=[0, 2])}, Task.I2V, "istarget_in_interleave holds 2"),
        ({"1": entry("a", "a.png") | {"interleave_array": ["a", 3]}}, Task.I2V, "must be a path, not a number"),
        ({"1": entry("a", "b", "a.png")}, Task.I2V, "needs one text, not 2"),
        ({"1": entry("a.png", "a", "b.png")}, Task.SUBJECT, "the text must stand before all visuals or after them"),
        ({"1": entry("a")}, Task.I2V, "task i2v needs an image"),
        ({"1": entry("a", "a.mp4")}, Task.I2V, "task i2v takes an image, not a.mp4"),
        ({"1": entry("a", "nowhere.png")}, Task.I2V, "image nowhere.png is neither in the working folder"),
        ({"1": entry("a", "n" * 5000 + ".png")}, Task.I2V, "is neither in the working folder"),
        ({"1": entry("a.png", ASKED[:2])}, None, "must be [instruction, question, answer]"),
        ({"1": entry("a.png", "text", targets=[0, 0])}, Task.X2T_IMAGE, "one text with istarget_in_interleave 1"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(values, task, line):
    path = write(values)
    with pytest.raises(LanceError) as error:
        read_requests(path, task)
    assert line in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_not_text_is_refused(folder):
    with pytest.raises(LanceError, match="nowhere.json does not exist"):
        read_requests("nowhere.json")
    (folder / "bytes.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(LanceError, match="not readable JSON"):
        read_requests("bytes.json")
