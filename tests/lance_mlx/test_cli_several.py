"""Several outputs of one run, their names and forms, what is never overwritten, and replaying what a picture tells."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile

import av
import numpy as np
import pytest
from PIL import Image

import lance_mlx.api as api
import lance_mlx.cli.drawing as cli_drawing
import lance_mlx.loaded as loaded
from lance_mlx.media.write import read_metadata, save_image

TINY = ["--vae-resolution", 64, "--vit-resolution", 56]
DRAWING = ["--width", 48, "--height", 32, "--steps", 2, "--numerics", "float32"]


@pytest.fixture
def draw(invoke, checkpoint, tmp_path, monkeypatch):
    """Run `generate` in an empty working folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        done = invoke("generate", *arguments, "--model", checkpoint)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_several_seeds_are_one_load_and_an_output_each(draw, monkeypatch):
    loads, original = [], loaded.load_pipeline
    monkeypatch.setattr(loaded, "load_pipeline", lambda *given: loads.append(1) or original(*given))
    draw("t2i", "--prompt", "a bird", "--seed", 1, 2, 3, "--batch-size", 1, "-o", "new/bird.png", *DRAWING)
    assert sorted(path.name for path in Path("new").iterdir()) == ["bird-1.png", "bird-2.png", "bird-3.png"]
    assert loads == [1]
    assert [read_metadata(f"new/bird-{seed}.png")["request"]["seed"] for seed in (1, 2, 3)] == [1, 2, 3]
    draw("t2i", "--prompt", "a bird", "--seed", 2, "-o", "{seed}.png", *DRAWING)
    assert np.array_equal(pixels("2.png"), pixels("new/bird-2.png"))
    again = ["--seed", 1, "--seed", 2, "--batch-size", 1, "-o", "again-{seed}.webp"]
    draw("t2i", "--prompt", "a bird", *again, *DRAWING)
    assert np.array_equal(pixels("again-2.webp"), pixels("2.png"))


def test_names_that_would_run_into_each_other_are_refused(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a\n" * 11, encoding="utf-8")
    given = ["--prompts-file", "prompts.txt", "--seed", 1, 11, "--model", tmp_path, *DRAWING]
    line = refused("generate", "t2i", *given, "-o", "{index}{seed}.png")
    assert "--output {index}{seed}.png names 111.png 2 times: part {index} and {seed} by a letter or a dash" in line


def test_automatic_seeds_differ(draw):
    draw("t2i", "--prompt", "a bird", "--auto-seeds", 2, *DRAWING)
    made = sorted(Path().glob("t2i-*.png"))
    assert len(made) == 2
    assert {f"t2i-{read_metadata(path)['request']['seed']}.png" for path in made} == {path.name for path in made}


def test_a_number_of_images_counts_its_seeds_on(draw, refused):
    draw("t2i", "--prompt", "a bird", "--seed", 7, "--num-images", 2, *DRAWING)
    assert sorted(path.name for path in Path().glob("t2i-*.png")) == ["t2i-7.png", "t2i-8.png"]
    for options, line in (
        (["--seed", 1, 2], "--num-images counts on from one --seed: give neither several nor --auto-seeds"),
        (["--auto-seeds", 2], "give neither several nor --auto-seeds"),
        (["--num-images", 0], "--num-images 0 must be between 1 and 10000"),
    ):
        assert line in refused("generate", "t2i", "--prompt", "a", "--model", ".", "--num-images", 2, *options)


def test_prompts_come_from_stdin_and_from_a_file(draw, monkeypatch):
    def typed(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    typed("a “bird”\nin the snow\n")
    draw("t2i", "--prompt", "-", "-o", "one.png", *DRAWING)
    assert read_metadata("one.png")["request"]["prompt"] == "a “bird”\nin the snow"
    Path("prompts.txt").write_text("a bird\n\n a cat \n", encoding="utf-8")
    draw("t2i", "--prompts-file", "prompts.txt", "--seed", 1, 2, *DRAWING)
    told = {path.name: read_metadata(path)["request"] for path in Path().glob("t2i-*.png")}
    expected = {f"t2i-{n}-{seed}.png": prompt for n, prompt in ((1, "a bird"), (2, "a cat")) for seed in (1, 2)}
    assert {name: request["prompt"] for name, request in told.items()} == expected
    typed("a bird\na cat")
    draw("t2i", "--prompts-file", "-", "-o", "p{index}.png", *DRAWING)
    assert sorted(path.name for path in Path().glob("p?.png")) == ["p1.png", "p2.png"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--seed", 1, "--auto-seeds", 2], "give --seed or --auto-seeds, not both"),
        (["--auto-seeds", 0], "--auto-seeds 0 must be between 1 and 10000"),
        (["--seed", 1, 1], "--seed 1 is given twice"),
        (["--prompts-file", "nowhere.txt"], "give --prompt or --prompts-file, not both"),
        (["--prompt", "-", "--prompt", "-"], "reads all of stdin: give it once"),
        (["--num-images", 2, "--noise", "noise.npy"], "--noise is for one output"),
        (["--seed", 1, "--noise", "noise.npy"], "--noise starts from what is given and no seed"),
        (["--seed", -1], "seed -1 must be at least 0"),
        (["--cache-limit-gb", -1], "--cache-limit-gb -1.0 must be 0 or more"),
        (["-o", "there.png"], "output there.png is there already; choose another name, or give --overwrite"),
        (["--seed", 1, 2, "-o", "{seed}/a.png", "--stepwise-output-dir", "s"], "put {seed} into that name"),
        (["--seed", 1, 2, "-o", "there.png", "--stepwise-output-dir", "there.png/steps"], "is not a folder"),
    ],
)
def test_what_cannot_be_made_is_one_line(refused, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    Path("there.png").write_bytes(b"mine")
    # The folder holds no model: nothing is computed.
    assert line in refused("generate", "t2i", "--model", tmp_path, "--prompt", "a bird", *arguments, *DRAWING)
    assert [path.name for path in tmp_path.iterdir()] == ["there.png"]


@pytest.mark.parametrize("text", [None, "", " \n\n", b"\xff"])
def test_a_prompts_file_without_prompts_is_one_line(refused, tmp_path, text):
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "prompts file" in refused("generate", "t2i", "--model", tmp_path, "--prompts-file", path)


def test_a_file_is_overwritten_only_when_that_is_said(draw, refused, checkpoint):
    given = ["t2i", "--prompt", "a bird", "-o", "bird.png", *DRAWING]
    Path("bird.png").write_bytes(b"mine")
    refused("generate", *given, "--model", checkpoint)
    assert Path("bird.png").read_bytes() == b"mine"
    draw(*given, "--overwrite")
    assert pixels("bird.png").shape == (32, 48, 3)


def test_every_suffix_is_its_form(draw):
    draw("t2v", "--prompt", "a bird", "--num-frames", 5, "--fps", 10, "-o", "bird.mov", *DRAWING)
    draw("t2v", "--prompt", "a bird", "--num-frames", 5, "--fps", 10, "-o", "bird.gif", *DRAWING)
    draw("t2i", "--prompt", "a bird", "-o", "bird.jpg", *DRAWING)
    with av.open("bird.mov") as video:
        assert (video.format.name.split(",")[0], video.streams.video[0].average_rate) == ("mov", 10)
    with Image.open("bird.gif") as image:
        assert (image.format, image.n_frames, image.info["duration"]) == ("GIF", 5, 100)
    assert Image.open("bird.jpg").format == "JPEG"
    assert {read_metadata(f"bird.{suffix}")["request"]["prompt"] for suffix in ("mov", "gif", "jpg")} == {"a bird"}


def test_a_picture_is_replayed_but_for_what_is_given(draw):
    options = ["--guidance", 3, "--scheduler", "heun", "--negative-prompt", "a cat", "--seed", 7]
    draw("t2i", "--prompt", "a bird", "-o", "bird.png", *options, *DRAWING)
    draw("--config-from", "bird.png", "-o", "again.png")
    assert np.array_equal(pixels("again.png"), pixels("bird.png"))
    assert read_metadata("again.png") == read_metadata("bird.png")
    draw("--config-from", "again.png", "-o", "other.png", "--seed", 8, "--steps", 3)
    told, before = read_metadata("other.png")["request"], read_metadata("bird.png")["request"]
    assert told == before | {"seed": 8, "num_steps": 3}
    assert read_metadata("bird.png")["departures"] == [
        "a negative prompt in place of the sequence without text",
        "heun in place of Euler steps",
    ]


def test_turns_of_an_edit_are_replayed(draw, media):
    given = ["--image", media / "logo.png", "--vae-resolution", 64, "--vit-resolution", 56, "--steps", 2]
    draw("image_edit", *given, "--prompt", "blue", "--prompt", "a hat", "--reencode", "-o", "hat.png")
    draw("--config-from", "hat.png", "-o", "again.png")
    assert np.array_equal(pixels("again.png"), pixels("hat.png"))
    assert read_metadata("again.png") == read_metadata("hat.png")


def test_all_that_made_a_video_is_replayed(draw, media):
    copyfile(media / "logo.png", "bird.png")
    options = ["--num-frames", 5, "--steps", 2, "--resolution", "image_256res", "--vae-resolution", 64]
    draw("i2v", "--image", "bird.png", "--prompt", "a", *options, "-o", "a.mp4")
    draw("--config-from", "a.mp4", "-o", "again.mp4")
    told = read_metadata("a.mp4")["request"]
    assert read_metadata("again.mp4")["request"] == told
    draw("--config-from", "a.mp4", "--resolution", "image_512res", "--vae-resolution", 48, "-o", "other.mp4")
    changed = {name: value for name, value in read_metadata("other.mp4")["request"].items() if value != told[name]}
    assert changed.items() >= {"vae_resolution": 48, "vit_resolution": 448}.items()
    assert changed.keys() <= {"vae_resolution", "vit_resolution", "width", "height"}


def test_a_seed_goes_before_the_noise_of_what_is_replayed(draw):
    np.save("noise.npy", np.zeros((6, 48), np.float32))
    draw("t2i", "--prompt", "a", "--noise", "noise.npy", *DRAWING, "-o", "still.png")
    draw("t2i", "--prompt", "a", "--seed", 3, *DRAWING, "-o", "three.png")
    draw("--config-from", "still.png", "-o", "again.png")
    draw("--config-from", "still.png", "--seed", 3, "-o", "other.png")
    assert np.array_equal(pixels("again.png"), pixels("still.png"))
    assert np.array_equal(pixels("other.png"), pixels("three.png"))
    assert read_metadata("other.png").get("noise") is None


def test_a_source_that_is_gone_is_said_to_be_the_files(draw, refused, media):
    copyfile(media / "logo.png", "bird.png")
    draw("image_edit", "--image", "bird.png", "--prompt", "a", "--steps", 2, *TINY, "-o", "a.png")
    Path("bird.png").unlink()
    line = refused("generate", "--config-from", "a.png", "--model", "x", "-o", "b.png")
    assert line == "lance-mlx: image bird.png, named by the metadata of a.png, does not exist: give --image"
    line = refused("generate", "--config-from", "a.png", "--image", "none.png", "--model", "x", "-o", "b.png")
    assert line == "lance-mlx: image none.png does not exist"


def test_a_file_without_a_request_cannot_be_replayed(refused, tmp_path, media):
    given = ["generate", "--model", tmp_path, "--config-from"]
    assert "holds no request written by lance-mlx" in refused(*given, media / "logo.png")
    assert "cannot read nowhere.png" in refused(*given, "nowhere.png")
    (tmp_path / "answer.txt").write_text("a bird")
    line = refused(*given, tmp_path / "answer.txt")
    assert line == f"lance-mlx: {tmp_path}/answer.txt holds no request written by lance-mlx"


def test_metadata_of_turns_that_nothing_takes_are_no_request(refused, tmp_path):
    request = api.Request("t2i", "a bird", height=32, width=32).to_dict()
    made = {"variant": "Lance_3B", "request": request, "earlier": [request]}
    save_image(tmp_path / "a.png", np.zeros((32, 32, 3), np.uint8), made)
    line = refused("generate", "--config-from", tmp_path / "a.png", "--model", "x", "-o", "b.png")
    assert line.endswith("a.png holds no request that can be replayed ('earlier' is for image_edit and video_edit)")


def test_every_step_is_shown(draw):
    draw("t2v", "--prompt", "a bird", "--num-frames", 5, "--stepwise-output-dir", "steps", "-o", "a.mp4", *DRAWING)
    assert sorted(path.name for path in Path("steps").iterdir()) == ["a-0001.png", "a-0002.png"]
    # Two latent frames of 2x3 cells side by side.
    assert pixels("steps/a-0001.png").shape == (16, 48, 3)


def test_the_cache_of_mlx_has_a_limit(draw, monkeypatch):
    limits = []
    monkeypatch.setattr("mlx.core.set_cache_limit", limits.append)
    draw("t2i", "--prompt", "a bird", "--cache-limit-gb", 0.5, *DRAWING)
    assert limits == [500_000_000]


def test_answers_are_drawn_with_several_seeds(draw, media):
    given = ["--image", media / "logo.png", "--vit-resolution", 56, "--max-tokens", 8, "--temperature", 2]
    told = draw("x2t_image", *given, "--seed", 1, 2, "-o", "{seed}.txt")
    assert told == Path("1.txt").read_text(encoding="utf-8") + Path("2.txt").read_text(encoding="utf-8")


def test_an_interrupt_says_what_is_written(draw, invoke, checkpoint, monkeypatch):
    drawn, original = [], cli_drawing.draw

    def stop(*given: object) -> object:
        if drawn:
            raise KeyboardInterrupt
        drawn.append(original(*given))
        return drawn[0]

    monkeypatch.setattr(cli_drawing, "draw", stop)
    given = ["--prompt", "a", "--seed", 1, 2, 3, "--batch-size", 1]
    done = invoke("generate", "t2i", "--model", checkpoint, *given, *DRAWING, "-Q")
    assert (done.returncode, done.stderr) == (130, "lance-mlx: interrupted; 1 of 3 are written\n")
    assert [path.name for path in Path().iterdir()] == ["t2i-1.png"]


def test_an_interrupt_says_where_pictures_of_steps_are(draw, invoke, checkpoint, monkeypatch):
    original = cli_drawing.save_image

    def save(path: Path, *given: object) -> None:
        if path.name == "a-0002.png":
            raise KeyboardInterrupt
        original(path, *given)

    monkeypatch.setattr(cli_drawing, "save_image", save)
    given = ["--prompt", "a", "--stepwise-output-dir", "steps", "-o", "a.png", *DRAWING, "-Q"]
    done = invoke("generate", "t2i", "--model", checkpoint, *given)
    assert (done.returncode, done.stderr) == (130, "lance-mlx: interrupted; 1 picture of steps in steps\n")
    assert [str(path) for path in Path().rglob("*.png")] == ["steps/a-0001.png"]


@pytest.mark.parametrize("file", [False, True])
def test_an_interrupted_answer_ends_its_line(draw, invoke, checkpoint, media, monkeypatch, file):
    original = api.LanceModel.answer

    def stopped(model: api.LanceModel, question: api.Question, show: Callable[[str], None], *given: object) -> object:
        if question.seed == 1:
            return original(model, question, show, *given)
        show("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(api.LanceModel, "answer", stopped)
    given = ["--image", media / "logo.png", "--vit-resolution", 56, "--max-tokens", 4, "--temp", 1, "--seed", 1, 2]
    output = ["-o", "{seed}.txt"] if file else []
    done = invoke("generate", "x2t_image", "--model", checkpoint, *given, *output)
    assert done.returncode == 130
    assert done.stdout.endswith("\nhalf\n")
    told = "interrupted; 1 of 2 are written" if file else "interrupted, nothing written"
    assert done.stderr.endswith(f"lance-mlx: {told}\n")
