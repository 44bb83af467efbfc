"""Benchmarks: prompts as evaluators and upstream have them, the files that evaluators read, going on after a stop."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lance_mlx.cli.drawing as cli_drawing
from lance_mlx.cli.benchmark import _grid
from lance_mlx.media.write import read_metadata
from lance_mlx.requests.benchmarks import Benchmark, read_benchmark

DRAWING = ["--width", 32, "--height", 32, "--steps", 1]
EDITING = ["--vae-resolution", 64, "--vit-resolution", 56, "--steps", 1]
BENCH = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
COW = {"tag": "colors", "include": [], "prompt": "a photo of a “cow”"}


def lines(path: str, *records: dict) -> Path:
    Path(path).write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return Path(path)


def edit(picture: object, key: str = "4a7d", task: str = "background_change") -> dict:
    return {
        "interleave_array": ["blue", str(picture), str(picture)],
        "element_dtype_array": ["text", "image", "image"],
        "istarget_in_interleave": [0, 0, 1],
        "additional_info": {"key": key, "task_type": task, "instruction_language": "en"},
    }


def test_what_is_said_to_be_there_is_there(make, invoke, checkpoint):
    prompts = lines("prompts.jsonl", {"index": "7", "data": "a bird"}, {"index": "8", "data": "a cow"})
    given = ["dpg", "--prompts", prompts, "-o", "out", "--model", checkpoint, "--samples", 2, *DRAWING]
    assert invoke("benchmark", *given).stdout.splitlines() == ["out/7.png: 2 samples", "out/8.png: 2 samples"]


@pytest.fixture
def make(invoke, checkpoint, tmp_path, monkeypatch):
    """Run `benchmark` in an empty working folder into `out`; returns the files that are there."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, prompts: object, *options: object) -> list[str]:
        done = invoke("benchmark", name, "--prompts", prompts, "-o", "out", "--model", checkpoint, *options)
        assert done.returncode == 0, done.stderr
        return sorted(str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file())

    return run


def test_geneval_has_metadata_and_samples(make):
    files = make("geneval", lines("prompts.jsonl", BENCH, COW), "--samples", 2, *DRAWING)
    assert files == [
        f"0000{entry}/{name}" for entry in (0, 1) for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    ]
    assert [json.loads(Path(f"out/0000{n}/metadata.jsonl").read_text(encoding="utf-8")) for n in (0, 1)] == [BENCH, COW]
    made = [read_metadata(f"out/00001/samples/000{n}.png")["request"] for n in (0, 1)]
    assert [(each["prompt"], each["seed"]) for each in made] == [(COW["prompt"], 42), (COW["prompt"], 43)]


def test_upstreams_own_files_ask_for_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    upstreams = [{"index": n, "data": each["prompt"], "additional_info": each} for n, each in enumerate((BENCH, COW))]
    theirs, ours = (
        read_benchmark(Benchmark.GENEVAL, lines(name, *records))
        for name, records in (("a.jsonl", upstreams), ("b.jsonl", (BENCH, COW)))
    )
    assert theirs == ours and len(ours[0].outputs) == 4
    Path("prompts").mkdir()
    Path("prompts/10.txt").write_text("a bird\n", encoding="utf-8")
    (dpg,) = read_benchmark(Benchmark.DPG, Path("prompts"))
    (same,) = read_benchmark(Benchmark.DPG, lines("DPG.jsonl", {"index": "10", "data": "a bird"}))
    assert (dpg.prompt, dpg.outputs, dpg.grid) == (same.prompt, same.outputs, same.grid) and dpg.grid == "10.png"
    longer = {"index": 0, "data": "A wide shot of an alley.", "original_prompt_en": "an alley"}
    (entry,) = read_benchmark(Benchmark.VBENCH, lines("recaption.jsonl", longer))
    assert (entry.prompt, entry.outputs[0]) == ("A wide shot of an alley.", "an alley-0.mp4")


def test_dpg_has_a_grid_of_all_samples(make):
    Path("prompts").mkdir()
    Path("prompts/whoops7.txt").write_text("a bird", encoding="utf-8")
    assert make("dpg", "prompts", *DRAWING) == ["whoops7.png"]
    assert Image.open("out/whoops7.png").size == (64, 64)
    assert read_metadata("out/whoops7.png")["seeds"] == [42, 43, 44, 45]
    assert [path.name for path in Path("out").iterdir()] == ["whoops7.png"]


def test_a_grid_has_rows_of_two():
    pictures = [np.full((1, 1, 3), value, np.uint8) for value in range(4)]
    assert _grid(pictures)[..., 0].tolist() == [[0, 1], [2, 3]]
    assert _grid(pictures[:3])[..., 0].tolist() == [[0, 1], [2, 255]]
    assert _grid(pictures[:2])[..., 0].tolist() == [[0, 1]]
    assert _grid(pictures[:1])[..., 0].tolist() == [[0]]


def test_gedit_has_folders_by_task_and_language_and_the_source(make, media):
    Path("gedit.json").write_text(json.dumps({"0040": edit(media / "logo.png")}), encoding="utf-8")
    files = make("gedit", "gedit.json", *EDITING)
    assert files == [f"fullset/background_change/en/4a7d{end}.png" for end in ("", "_SRCIMG")]
    assert Image.open("out/fullset/background_change/en/4a7d_SRCIMG.png").size == Image.open(media / "logo.png").size
    assert read_metadata("out/fullset/background_change/en/4a7d.png")["request"]["task"] == "image_edit"


def parquet_of(media: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    picture = io.BytesIO()
    Image.open(media / "phone.jpg").save(picture, format="PNG")
    rows = [
        {"key": key, "task_type": "color_alter", "instruction": "蓝色", "instruction_language": "cn",
         "input_image": {"bytes": picture.getvalue(), "path": None}}
        for key in ("a", "b")
    ]  # fmt: skip
    Path("data").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), "data/train-00000-of-00001.parquet")


def test_gedits_parquet_files_are_read(make, media):
    parquet_of(media)
    files = make("gedit", "data", "--limit", 1, *EDITING)
    assert files == ["fullset/color_alter/cn/a.png", "fullset/color_alter/cn/a_SRCIMG.png"]
    assert len(read_benchmark(Benchmark.GEDIT, Path("data"))) == 2


def test_parquet_without_pyarrow_is_one_line(refused, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    Path("a.parquet").write_bytes(b"PAR1")
    line = refused("benchmark", "gedit", "--prompts", "a.parquet", "-o", "out", "--model", checkpoint)
    assert line.endswith("needs pyarrow: pip install '.[benchmark]' in the checkout")


def test_vbench_names_videos_by_their_prompts(make):
    asked = [
        {"prompt_en": "a toilet, frozen in time", "dimension": ["temporal_flickering"]},
        {"prompt_en": "a bird. by Hokusai", "dimension": ["scene"]},
        {"prompt_en": "a bird. by Hokusai", "dimension": ["color"], "auxiliary_info": {}},
    ]
    Path("full.json").write_text(json.dumps(asked), encoding="utf-8")
    Path("all.txt").write_text("a bird. by Hokusai\n", encoding="utf-8")
    assert [len(entry.outputs) for entry in read_benchmark(Benchmark.VBENCH, Path("full.json"))] == [25, 5]
    assert [len(entry.outputs) for entry in read_benchmark(Benchmark.VBENCH, Path("full.json"), 2)] == [2, 2]
    assert make("vbench", "all.txt", "--samples", 2, "--num-frames", 5, *DRAWING) == [
        "a bird. by Hokusai-0.mp4",
        "a bird. by Hokusai-1.mp4",
    ]
    made = read_metadata("out/a bird. by Hokusai-1.mp4")["request"]
    assert (made["timestep_shift"], made["seed"], made["num_frames"]) == (3.0, 43, 5)


def test_a_run_that_was_stopped_goes_on_and_makes_nothing_again(make, invoke, checkpoint, monkeypatch):
    Path("prompts").mkdir()
    for name in "ab":
        Path(f"prompts/{name}.txt").write_text(f"a {name}", encoding="utf-8")
    given = ["dpg", "--prompts", "prompts", "-o", "out", "--model", checkpoint, *DRAWING]
    original, drawn = cli_drawing._write, []

    def write(drawing: cli_drawing.Drawing, *rest: object) -> None:
        if len(drawn) == 6:
            raise KeyboardInterrupt
        drawn.append(drawing.path.name)
        original(drawing, *rest)

    monkeypatch.setattr(cli_drawing, "_write", write)
    done = invoke("benchmark", *given)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        130,
        "lance-mlx: interrupted; 6 of 8 are in out: the same command goes on from there",
    )
    assert sorted(str(path) for path in Path("out").rglob("*.png")) == [
        "out/.samples/b-0.png", "out/.samples/b-1.png", "out/a.png",
    ]  # fmt: skip
    drawn.clear()
    assert make("dpg", "prompts", *DRAWING) == ["a.png", "b.png"]
    assert drawn == ["b-2.png", "b-3.png"]
    drawn.clear()
    assert "out: 8 of 8 are there already" in invoke("benchmark", *given).stdout and drawn == []


def test_what_was_made_in_another_way_is_refused_and_made_anew_when_that_is_said(make, refused, checkpoint):
    prompts = lines("prompts.jsonl", BENCH)
    make("geneval", prompts, "--samples", 1, *DRAWING)
    again = ["geneval", "--prompts", prompts, "-o", "out", "--samples", 1, "--width", 32, "--height", 32, "--steps", 2]
    line = refused("benchmark", *again, "--model", checkpoint)
    assert "out/00000/samples/0000.png was made in another way" in line and line.endswith("or give --overwrite")
    make("geneval", prompts, "--samples", 1, *DRAWING[:-1], 2, "--overwrite")
    assert read_metadata("out/00000/samples/0000.png")["request"]["num_steps"] == 2


@pytest.mark.parametrize(
    ("name", "prompts", "options", "line"),
    [
        ("geneval", "nowhere.jsonl", [], "prompts nowhere.jsonl do not exist"),
        ("geneval", "empty", [], "prompts empty hold no prompt of geneval"),
        ("geneval", "bad.jsonl", [], "bad.jsonl: line 1 is not JSON: JSON Lines are needed"),
        ("geneval", "array.jsonl", [], "array.jsonl: line 1 is not an object"),
        ("geneval", "untold.jsonl", [], "untold.jsonl: entry 'line 1': it needs a text 'prompt'"),
        ("geneval", "good.jsonl", ["--num-frames", 5], "--num-frames means nothing to geneval"),
        ("geneval", "good.jsonl", ["--vae-resolution", 64], "--vae-resolution means nothing to geneval"),
        ("geneval", "good.jsonl", ["--width", 33], "entry 'line 1': --width 33 must be a multiple of 16"),
        ("geneval", "token.jsonl", [], "entry 'line 1': the prompt contains the control token <|video_pad|>"),
        ("geneval", "good.jsonl", ["-o", "good.jsonl"], "good.jsonl is not a folder"),
        ("geneval", "there", [], "prompts there are not readable (Is a directory)"),
        ("dpg", "texts", [], "texts: entry 'bird.txt': it is empty: write the prompt into it"),
        ("dpg", "good.jsonl", ["--samples", 5], "--samples 5 must be between 1 and 4 for dpg"),
        ("dpg", "good.jsonl", ["--width", 32], "give the same --width and --height"),
        ("dpg", "twice.jsonl", [], "entries 'line 1' and 'line 2' would both be written as 1.png"),
        ("gedit", "gedit.json", ["--width", 64], "--width means nothing to gedit"),
        ("gedit", "gedit.json", [], "entry '0002': '../x' cannot be the name of a file"),
        ("gedit", "there", [], "prompts there hold no prompt of gedit"),
        ("vbench", "good.jsonl", [], "entry 'line 1': it needs a text 'prompt_en'"),
        ("vbench", "slash.txt", [], "'a/b' cannot be the name of a file"),
        ("vbench", "long.txt", [], "File name too long"),
        ("vbench", "lone.json", [], "entry 'number 1': 'a \\ud800' cannot be the name of a file"),
        ("vbench", "gedit.json", [], "an array of objects with prompt_en is needed"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(refused, tmp_path, media, monkeypatch, name, prompts, options, line):
    monkeypatch.chdir(tmp_path)
    lines("good.jsonl", BENCH)
    lines("untold.jsonl", {"tag": "x"})
    lines("token.jsonl", {"prompt": "<|video_pad|>"})
    lines("twice.jsonl", {"index": "1", "data": "a"}, {"index": "1", "data": "b"})
    texts = {
        "empty": "\n",
        "bad.jsonl": "{",
        "array.jsonl": "[]",
        "slash.txt": "a/b",
        "long.txt": f"a bird\n{'a' * 300}",
        "lone.json": json.dumps([{"prompt_en": "a \ud800"}]),
    }
    texts["gedit.json"] = json.dumps({"1": edit(media / "logo.png"), "0002": edit(media / "logo.png", "../x")})
    for file, text in texts.items():
        Path(file).write_text(text, encoding="utf-8")
    Path("there").mkdir()
    Path("texts").mkdir()
    Path("texts/bird.txt").write_text("\n", encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    # The folder holds no model: nothing is computed.
    output = [] if "-o" in options else ["-o", "out"]
    assert line in refused("benchmark", name, "--prompts", prompts, "--model", tmp_path, *output, *options)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "prompts", "pair"),
    [
        ("vbench", "all.txt", "'a Bird-0.mp4' and 'a bird-0.mp4'"),
        ("dpg", "all.jsonl", "'A.png' and 'a.png'"),
        ("gedit", "all.json", "'fullset/background_change/en/4A.png' and 'fullset/background_change/en/4a.png'"),
    ],
)
def test_prompts_that_differ_in_capitals_alone_are_told_where_the_disk_takes_them_for_one(
    refused, tmp_path, media, monkeypatch, name, prompts, pair
):
    monkeypatch.chdir(tmp_path)
    Path("all.txt").write_text("a Bird\na bird\n", encoding="utf-8")
    lines("all.jsonl", {"index": "A", "data": "a bird"}, {"index": "a", "data": "a cow"})
    edits = {f"000{n}": edit(media / "logo.png", key) for n, key in enumerate(("4A", "4a"))}
    Path("all.json").write_text(json.dumps(edits), encoding="utf-8")
    touch, before = Path.touch, sorted(tmp_path.iterdir())
    monkeypatch.setattr(Path, "touch", lambda path, exist_ok: touch(path.parent / path.name.lower(), exist_ok=exist_ok))
    line = refused("benchmark", name, "--prompts", prompts, "-o", "out", "--model", tmp_path)
    assert f"the disk of out takes {pair} for one file: choose an --output on a disk that tells capitals apart" in line
    assert line.endswith(f"leave one of the two out of {prompts}") and sorted(tmp_path.iterdir()) == before


def test_a_picture_that_cannot_be_read_is_one_line(refused, checkpoint, tmp_path, media, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gedit.json").write_text(json.dumps({"7": edit(media / "text.png")}), encoding="utf-8")
    line = refused("benchmark", "gedit", "--prompts", "gedit.json", "-o", "out", "--model", checkpoint, *EDITING)
    assert "gedit.json: entry '7': its picture cannot be copied" in line
    assert not list(Path("out").rglob("*.png"))
