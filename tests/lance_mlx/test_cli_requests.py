"""Request files from the command line: all seven of upstream's forms, what is written, and going on after a stop."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest
from PIL import Image

from lance_mlx.media.write import read_metadata

COMMAND = Path(sys.executable).parent / "lance-mlx"
ANIMATING = ["--vae-resolution", 64, "--steps", 2]
LOOKING = [*ANIMATING, "--vit-resolution", 56]
DRAWING = ["--width", 48, "--height", 32, "--steps", 2]
ASKING = ["--vit-resolution", 56, "--max-tokens", 6]


def edit(prompt: str, path: str, dtype: str) -> dict[str, list]:
    return {
        "interleave_array": [prompt, path],
        "element_dtype_array": ["text", dtype],
        "istarget_in_interleave": [0, 0],
    }


def ask(path: str, question: str, dtype: str) -> dict[str, list]:
    return {
        "interleave_array": [path, ["Look at it.", question, "a bird"]],
        "element_dtype_array": [dtype, "text"],
        "istarget_in_interleave": [0, 1],
    }


@pytest.fixture
def folder(tmp_path, media, monkeypatch) -> Path:
    """A working folder with upstream's kind of request files and a folder of media."""
    shutil.copytree(media, tmp_path / "media")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, values: dict) -> Path:
    path = Path(f"{name}_example.json")
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("task", "values", "options", "names"),
    [
        ("t2i", {"000000.png": "a bird", "000003.png": "a “cat”"}, DRAWING, ["000000.png", "000003.png"]),
        ("t2v", {"000000.mp4": "a bird"}, [*DRAWING, "--num-frames", 5], ["000000.mp4"]),
        ("i2v", {"1": edit("it flies", "media/phone.jpg", "image")}, [*ANIMATING, "--num-frames", 5], ["000001.mp4"]),
        ("image_edit", {"00008": edit("blue", "media/logo.png", "image")}, LOOKING, ["000008.png"]),
        (
            "video_edit",
            {"0001": edit("red", "media/clip30.mp4", "video"), "0002": edit("red", "media/still.mp4", "video")},
            LOOKING,
            ["000001.mp4", "000002.png"],
        ),
    ],
)
def test_drawing_writes_upstreams_names_and_prompts(run, checkpoint, folder, task, values, options, names):
    path = write(task, values)
    done = run("generate", "--requests", path, "--model", checkpoint, "--output", "results", *options)
    assert done.returncode == 0, done.stderr
    prompts = [value if isinstance(value, str) else value["interleave_array"][0] for value in values.values()]
    assert sorted(file.name for file in Path("results").iterdir()) == sorted([*names, "prompt.json"])
    written = Path("results/prompt.json").read_text(encoding="utf-8")
    assert written == json.dumps(dict(zip(names, prompts, strict=True)), ensure_ascii=False, indent=2)
    for name, prompt in zip(names, prompts, strict=True):
        request = read_metadata(Path("results") / name)["request"]
        assert (request["task"], request["prompt"]) == (task, prompt)
    assert done.stdout.count("s a step") == len(names)


@pytest.mark.parametrize(
    ("dtype", "file", "other"), [("image", "logo.png", "phone.jpg"), ("video", "clip23.mp4", "portrait.mp4")]
)
def test_answers_are_written_as_upstream_writes_them(run, checkpoint, folder, dtype, file, other):
    values = {"0001": ask(f"media/{file}", "what is it", dtype), "0002": ask(f"media/{other}", "who is it", dtype)}
    path = write("questions", values)
    done = run("generate", "--requests", path, "--model", checkpoint, "--output", "results", *ASKING)
    assert done.returncode == 0, done.stderr
    prompts = json.loads(Path("results/prompt.json").read_text(encoding="utf-8"))
    assert list(prompts) == [file, other]
    results = json.loads(Path("results/result.json").read_text(encoding="utf-8"))
    assert [list(result) for result in results] == [[dtype, "question", "answer"]] * 2
    assert [result[dtype] for result in results] == [f"media/{file}", f"media/{other}"]
    assert [result["question"] for result in results] == ["what is it", "who is it"]
    assert [result["answer"] for result in results] == [
        text.replace("<|im_end|>", "").strip() for text in prompts.values()
    ]
    assert done.stdout.startswith("0001: ")


def test_questions_about_one_picture_keep_their_own_answers(run, checkpoint, folder):
    values = {f"000{n}": ask("media/logo.png", q, "image") for n, q in enumerate(["what is it", "who", "a bird?"])}
    done = run("generate", "--requests", write("x", values), "--model", checkpoint, *ASKING)
    assert done.returncode == 0, done.stderr
    # Without --output, the folder is named after the file.
    prompts = json.loads(Path("x_example/prompt.json").read_text(encoding="utf-8"))
    assert list(prompts) == list(values)
    results = json.loads(Path("x_example/result.json").read_text(encoding="utf-8"))
    assert len({result["answer"] for result in results}) > 1


def test_what_is_there_is_not_made_again(run, checkpoint, folder):
    path = write("t2i", {f"00000{n}.png": f"bird {n}" for n in range(3)})
    given = ["generate", "--requests", path, "--model", checkpoint, "--output", "results", *DRAWING]
    assert run(*given).returncode == 0
    made = {file.name: file.stat().st_mtime_ns for file in Path("results").glob("*.png")}
    Path("results/000001.png").unlink()
    Path("results/prompt.json").unlink()
    done = run(*given)
    assert done.returncode == 0, done.stderr
    assert "results: 2 of 3 are there already" in done.stdout
    again = {file.name: file.stat().st_mtime_ns for file in Path("results").glob("*.png")}
    assert [name for name in sorted(again) if again[name] != made[name]] == ["000001.png"]
    prompts = json.loads(Path("results/prompt.json").read_text(encoding="utf-8"))
    assert prompts == {f"00000{n}.png": f"bird {n}" for n in range(3)}


def test_answers_that_are_there_are_not_asked_for_again(run, checkpoint, folder):
    values = {"0001": ask("media/logo.png", "what is it", "image"), "0002": ask("media/phone.jpg", "who", "image")}
    Path("results").mkdir()
    Path("results/prompt.json").write_text(json.dumps({"logo.png": " kept<|im_end|>"}), encoding="utf-8")
    given = ["generate", "--requests", write("x2t_image", values), "--model", checkpoint, "--output", "results"]
    done = run(*given, *ASKING)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("results/prompt.json").read_text(encoding="utf-8"))["logo.png"] == " kept<|im_end|>"
    assert json.loads(Path("results/result.json").read_text(encoding="utf-8"))[0]["answer"] == "kept"


def test_an_interrupted_run_says_what_is_kept_and_goes_on(run, checkpoint, folder):
    path = write("t2i", {f"{n:06d}.png": f"bird {n}" for n in range(200)})
    command = [COMMAND, "generate", "--requests", path, "--model", checkpoint, "--output", "results"]
    options = list(map(str, DRAWING))
    running = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(list(Path("results").glob("*.png"))) < 2:
        assert running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=600)
    assert running.returncode == 130
    assert "of 200 are in results: the same command goes on from there" in errors
    assert "Traceback" not in errors
    assert not list(Path("results").glob(".*"))
    images = sorted(Path("results").glob("*.png"))
    prompts = json.loads(Path("results/prompt.json").read_text(encoding="utf-8"))
    assert len(images) - len(prompts) in (0, 1)
    for image in images:
        Image.open(image).load()


@pytest.mark.parametrize(
    ("values", "arguments", "line"),
    [
        ({"1.png": "a", "2.png": 3}, [], "entry '2.png': a prompt or an object with"),
        ({"1": edit("a", "media/logo.png", "image")}, ["image_edit", "--width", 32], "its size from the source"),
        ({"1": edit("a <|video_pad|>", "media/logo.png", "image")}, ["i2v"], "entry '1': the prompt contains"),
        ({"1.png": "a"}, ["--prompt", "b"], "--prompt goes with a single request"),
        ({"1.png": "a"}, ["--image", "media/logo.png"], "--image goes with a single request"),
        ({"1.png": "a"}, ["--max-tokens", 3], "--max-tokens means nothing to task t2i"),
        ({"1.png": "a"}, ["--output", "bad.json"], "bad.json is not a folder"),
        ({"1.png": "a"}, ["--output", "foreign"], "foreign/prompt.json does not map names to texts"),
        ({"1": edit("a", "media/text.png", "image")}, ["i2v"], "entry '1': image media/text.png is in no format"),
    ],
)
def test_bad_files_are_refused_before_anything_is_made(refused, checkpoint, folder, values, arguments, line):
    Path("foreign").mkdir()
    Path("foreign/prompt.json").write_text("[]", encoding="utf-8")
    Path("bad.json").write_text(json.dumps(values), encoding="utf-8")
    given = ["--requests", "bad.json", "--model", checkpoint, "--output", "results"]
    assert line in refused("generate", *given, *arguments)
    assert not list(Path().rglob("00*"))


def test_outputs_of_another_file_are_not_taken_for_these(run, refused, checkpoint, folder):
    given = ["--model", checkpoint, "--output", "results", *DRAWING]
    assert run("generate", "--requests", write("t2i", {"1.png": "a bird"}), *given).returncode == 0
    line = refused("generate", "--requests", write("t2i", {"1.png": "a cat"}), *given)
    assert "results/000001.png was made from another request" in line


def test_a_video_of_a_request_file_plays(run, checkpoint, folder):
    path = write("t2v", {"7.mp4": "a bird"})
    done = run("generate", "--requests", path, "--model", checkpoint, "-Q", *DRAWING, "--num-frames", 9, "--fps", 6)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with av.open("t2v_example/000007.mp4") as video:
        assert video.streams.video[0].average_rate == 6
        assert sum(1 for _ in video.decode(video=0)) == 9


@pytest.mark.parametrize("change", [["--seed", 1], ["--width", 64], ["--steps", 1], ["--numerics", "float32"],
                                    ["--scheduler", "heun"], ["--variant", "video"], ["-q", 8]])  # fmt: skip
def test_what_was_drawn_otherwise_is_not_taken_for_the_same(drawn_once, invoke, refused, change):
    given = [*drawn_once, *change]
    before = Path("results/000001.png").read_bytes()
    assert "000001.png was made from another request: choose another --output, remove it, or give" in refused(*given)
    assert Path("results/000001.png").read_bytes() == before
    assert invoke(*given, "--overwrite").returncode == 0
    assert Path("results/000001.png").read_bytes() != before
    assert "1 of 1 are there already" in invoke(*given).stdout


@pytest.fixture
def drawn_once(invoke, checkpoint, folder) -> list:
    """The arguments that have drawn one item."""
    given = ["generate", "--requests", write("t2i", {"1.png": "a bird"}), "--model", checkpoint, "-o", "results"]
    assert invoke(*given, *DRAWING).returncode == 0
    return [*given, *DRAWING]


def test_another_source_is_another_request(invoke, refused, checkpoint, folder):
    given = ["generate", "--model", checkpoint, "-o", "results", *LOOKING, "--requests"]
    path = write("image_edit", {"1": edit("blue", "media/logo.png", "image")})
    assert invoke(*given, path).returncode == 0
    assert "1 of 1 are there already" in invoke(*given, path).stdout
    assert "was made from another request" in refused(*given, path, "--vit-source", "vit_file")
    write("image_edit", {"1": edit("blue", "media/phone.jpg", "image")})
    assert "was made from another request" in refused(*given, path)


def test_a_source_that_has_changed_is_another_request(invoke, refused, checkpoint, folder):
    common = ["generate", "--model", checkpoint, "--requests"]
    editing = [*common, write("image_edit", {"1": edit("blue", "media/logo.png", "image")}), "-o", "drawn", *LOOKING]
    asking = [*common, write("x2t_image", {"1": ask("media/logo.png", "what is it", "image")}), "-o", "asked", *ASKING]
    for given in (editing, asking):
        assert invoke(*given).returncode == 0
    shutil.copyfile("media/phone.jpg", "media/logo.png")
    for given in (editing, asking):
        assert "was made from another request" in refused(*given)


@pytest.mark.parametrize(
    ("words", "options"),
    [("who is it", []), ("what is it", ["--max-tokens", 5]), ("what is it", ["--numerics", "float32"]),
     ("what is it", ["--temp", 1]), ("what is it", ["--vit-resolution", 84])],
)  # fmt: skip
def test_what_was_asked_otherwise_is_not_taken_for_the_same(invoke, refused, checkpoint, folder, words, options):
    def asked(question: str, *more: object) -> list:
        path = write("x2t_image", {"0001": ask("media/logo.png", question, "image")})
        return ["generate", "--requests", path, "--model", checkpoint, "-o", "results", *ASKING, *more]

    assert invoke(*asked("what is it")).returncode == 0
    assert "1 of 1 are there already" in invoke(*asked("what is it")).stdout
    line = refused(*asked(words, *options))
    assert "logo.png in results was made from another request: choose another --output" in line
    assert invoke(*asked(words, *options, "--overwrite")).returncode == 0
    assert "1 of 1 are there already" in invoke(*asked(words, *options)).stdout


def test_requests_take_one_seed(refused, checkpoint, folder):
    path = write("t2i", {"1.png": "a bird"})
    given = ["generate", "--requests", path, "--model", checkpoint]
    assert "--requests takes one --seed" in refused(*given, "--seed", 1, 2)


def test_the_examples_of_the_documentation_run(invoke, checkpoint, folder):
    text = (Path(__file__).parents[2] / "docs/generating.md").read_text(encoding="utf-8")
    section = text.partition("## Request files\n")[2].partition("\n## ")[0]
    examples = re.findall(r"^    \{\n.*?^    \}\n", section, re.MULTILINE | re.DOTALL)
    shutil.copyfile("media/logo.png", "cat.png")
    runs = (("t2i", DRAWING, ["000001.png", "000002.png", "prompt.json"]),
            ("image_edit", LOOKING, ["000001.png", "prompt.json"]),
            ("x2t_image", ASKING, ["prompt.json", "result.json"]))  # fmt: skip
    for example, (task, options, files) in zip(examples, runs, strict=True):
        Path(f"{task}.json").write_text(example, encoding="utf-8")
        done = invoke("generate", "--requests", f"{task}.json", "--model", checkpoint, "-o", task, *options)
        assert done.returncode == 0, done.stderr
        assert set(files) <= {path.name for path in Path(task).iterdir()}
