"""Every task from the command line, with the files that users have, and what is refused."""

import os
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from lance_mlx.media.write import read_metadata

ANIMATED = ["--vae-resolution", 64, "--steps", 2, "-Q"]
SMALL = [*ANIMATED, "--vit-resolution", 56]


def frames_of(path) -> np.ndarray:
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


@pytest.mark.parametrize(("name", "size"), [("phone.jpg", (48, 80)), ("logo.png", (80, 48))])
def test_an_edited_image_has_the_upright_shape_of_its_source(run, tmp_path, checkpoint, media, name, size):
    output = tmp_path / "edited.png"
    given = ["--model", checkpoint, "--image", media / name, "--prompt", "make the bird blue", "-o", output]
    done = run("generate", "image_edit", *given, *SMALL)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert Image.open(output).size == size
    written = read_metadata(output)["request"]
    assert written["visuals"] == [{"path": str(media / name), "kind": "image"}]
    assert (written["vae_resolution"], written["vit_resolution"]) == (64, 56)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("clip30.mp4", (9, 48, 80, 3)),
        ("clip23.mp4", (9, 48, 80, 3)),
        ("portrait.mp4", (5, 80, 48, 3)),
        ("still.mp4", None),
    ],
)
def test_an_edited_video_has_the_shape_and_the_seconds_of_its_source(run, tmp_path, checkpoint, media, name, shape):
    # A video of one frame is an image.
    output = tmp_path / ("edited.mp4" if shape else "edited.png")
    given = ["--model", checkpoint, "--video", media / name, "--prompt", "make the car red", "-o", output]
    done = run("generate", "video_edit", *given, *SMALL)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    if shape:
        assert frames_of(output).shape == shape
    else:
        assert Image.open(output).size == (64, 64)
    assert read_metadata(output)["request"]["task"] == "video_edit"


def test_stored_pixels_are_taken_when_asked_for_and_again_when_replayed(run, tmp_path, checkpoint, media):
    given = ["--model", checkpoint, "--image", media / "phone.jpg", "--prompt", "make the bird blue", "--as-upstream"]
    run("generate", "image_edit", *given, "-o", tmp_path / "edited.png", *SMALL)
    run("generate", "--model", checkpoint, "--config-from", tmp_path / "edited.png", "-o", tmp_path / "again.png", "-Q")
    for name in ("edited.png", "again.png"):
        assert Image.open(tmp_path / name).size == (80, 48)
        assert read_metadata(tmp_path / name)["request"]["as_upstream"] is True


def test_a_question_is_about_stored_pixels_when_asked_for(invoke, checkpoint, wide_video):
    # So far from square that it is refused as it is shown.
    given = [
        "generate",
        "x2t_video",
        "--model",
        checkpoint,
        "--video",
        wide_video(64, 32, aspect=9),
        "--question",
        "what is it",
    ]
    small = ["--vit-resolution", 56, "--max-tokens", 2, "-Q"]
    shown, stored = (invoke(*given, *small, *more) for more in ([], ["--as-upstream"]))
    assert shown.returncode == 2 and "is 576x32 pixels" in shown.stderr
    assert stored.returncode == 0 and stored.stdout


def test_an_image_is_animated_at_its_own_shape(run, tmp_path, checkpoint, media):
    output = tmp_path / "moving.mp4"
    given = ["--model", checkpoint, "--image", media / "logo.png", "--prompt", "the bird flies", "-o", output]
    done = run("generate", "i2v", *given, "--num-frames", 6, "--fps", 8, *ANIMATED)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert frames_of(output).shape == (5, 48, 80, 3)
    with av.open(str(output)) as video:
        assert video.streams.video[0].average_rate == Fraction(8)


def test_subjects_are_drawn_at_the_size_asked_for(run, tmp_path, checkpoint, media):
    output = tmp_path / "both.png"
    images = ["--image", media / "phone.jpg", "--image", media / "logo.png"]
    given = ["--model", checkpoint, *images, "--prompt", "the two in a garden", "-o", output]
    done = run("generate", "subject", *given, "--width", 80, "--height", 32, *SMALL)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert Image.open(output).size == (80, 32)
    assert len(read_metadata(output)["request"]["visuals"]) == 2


@pytest.mark.parametrize(
    ("task", "visuals"),
    [
        ("x2t_image", ["--image", "phone.jpg"]),
        ("x2t_image", ["--image", "logo.png", "--image", "phone.jpg"]),
        ("x2t_video", ["--video", "clip30.mp4"]),
        ("x2t_video", ["--video", "portrait.mp4"]),
        ("x2t_video", ["--video", "still.mp4"]),
    ],
)
def test_an_answer_is_printed_and_written(run, tmp_path, checkpoint, media, task, visuals):
    output = tmp_path / "answer.txt"
    visuals = [media / value if "." in value else value for value in visuals]
    given = ["--model", checkpoint, *visuals, "--question", "what is on the fence", "-o", output]
    # The locale's encoding could not hold what these weights answer.
    done = run("generate", task, *given, "--vit-resolution", 56, "--max-tokens", 12, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout == output.read_text(encoding="utf-8")
    assert len(done.stdout) > 1
    assert " s a token" in done.stderr
    assert "peak memory" in done.stderr


def test_an_answer_can_be_drawn_and_repeated(run, checkpoint, media):
    given = ["--model", checkpoint, "--image", media / "logo.png", "--vit-resolution", 56, "--max-tokens", 12, "-Q"]
    answers = [run("generate", "x2t_image", *given, "--temp", 2, "--top-p", 0.9, "--seed", seed) for seed in (1, 1, 2)]
    assert [done.stderr for done in answers] == ["", "", ""]
    assert answers[0].stdout == answers[1].stdout != answers[2].stdout


def test_each_further_prompt_edits_the_result_of_the_one_before(run, tmp_path, checkpoint, media):
    turns = ["--prompt", "make the bird blue", "--prompt", "add a hat"]
    made = {}
    for name, arguments in {"one": turns[:2], "two": turns, "anew": [*turns, "--reencode"]}.items():
        output = tmp_path / f"{name}.png"
        given = ["--model", checkpoint, "--image", media / "logo.png", "-o", output, *arguments]
        done = run("generate", "image_edit", *given, *SMALL)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        made[name] = np.asarray(Image.open(output))
    assert len({pixels.tobytes() for pixels in made.values()}) == 3
    written = read_metadata(tmp_path / "two.png")
    assert written["request"]["prompt"] == "add a hat"
    assert [request["prompt"] for request in written["earlier"]] == ["make the bird blue"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["image_edit", "--image", "text.png"], "text.png is in no format that Pillow reads"),
        (["video_edit", "--video", "cut.mp4"], "cut.mp4"),
        (["video_edit", "--video", "text.png"], "text.png is no video"),
        (["video_edit", "--video", "text.mp4"], "text.mp4 is no video"),
        (["image_edit", "--image", "clip30.mp4"], "clip30.mp4 is a video: x2t_video and video_edit take one"),
        (["image_edit", "--image", "dot.png"], "dot.png is 1x1 pixels"),
        (["image_edit", "--image", "ribbon.png"], "ribbon.png is 20000x10 pixels"),
        (["image_edit", "--image", "nowhere.png"], "nowhere.png does not exist"),
        (["image_edit"], "task image_edit needs an image"),
        (
            ["image_edit", "--video", "clip30.mp4"],
            "takes an image or images, not a video: {media}/clip30.mp4; video_edit takes it",
        ),
        (["video_edit", "--image", "logo.png"], "takes a video, not an image: {media}/logo.png; image_edit takes it"),
        (["i2v", "--image", "logo.png", "--image", "logo.png"], "takes one image, not 2"),
        (
            ["image_edit", "--image", "logo.png", "--width", "64"],
            "takes its size from the source, about as large as --resolution says",
        ),
        (["image_edit", "--image", "logo.png", "--resolution", "8k"], "unknown resolution '8k'"),
        (["image_edit", "--image", "logo.png", "--vae-resolution", "1"], "--vae-resolution 1 must be at least 16"),
        (["image_edit", "--image", "logo.png", "--prompt", "<|image_pad|>"], "control token <|image_pad|>"),
        (["image_edit", "--image", "logo.png", "--output", "a.mp4"], "one frame is an image"),
        (["image_edit", "--image", "logo.png", "--rewrite"], "it is for t2v and i2v; leave it out"),
        (["video_edit", "--video", "clip30.mp4", "--num-frames", "9"], "takes its frames from the source"),
        (["i2v", "--image", "logo.png", "--question", "what"], "--question means nothing to task i2v: give --prompt"),
    ],
)
def test_bad_input_to_drawing_is_one_line(refused, tmp_path, media, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    arguments = [media / value if (media / value).is_file() else value for value in arguments]
    # The folder holds no model: whatever is wrong with the request is found before one is read.
    assert line.format(media=media) in refused(
        "generate", *arguments, "--model", tmp_path, "--prompt", "make the bird blue"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["x2t_image", "--question", "what"], "task x2t_image needs an image"),
        (["x2t_image", "--image", "text.png"], "text.png is in no format that Pillow reads"),
        (["x2t_video", "--video", "cut.mp4"], "cut.mp4"),
        (
            ["x2t_image", "--image", "logo.png", "--prompt", "what"],
            "--prompt means nothing to task x2t_image: give --question",
        ),
        (["x2t_image", "--image", "logo.png", "--steps", "3"], "--steps means nothing to task x2t_image"),
        (["x2t_image", "--image", "logo.png", "--max-tokens", "0"], "--max-tokens 0 must be at least 1"),
        (["x2t_image", "--image", "logo.png", "--temp", "1", "--top-p", "0"], "--top-p 0.0 must be above 0"),
        (["x2t_image", "--image", "logo.png", "--temp", "-1"], "--temp -1.0 must be 0 or more"),
        (["x2t_image", "--image", "logo.png", "--output", "a.png"], "an answer is text; use .txt or .md"),
        (["x2t_image", "--image", "logo.png", "--output", "a.json"], "an answer is text; use .txt or .md"),
        (["x2t_image", "--image", "clip30.mp4"], "clip30.mp4 is a video: x2t_video and video_edit take one"),
        (["x2t_image", "--video", "clip30.mp4"], "clip30.mp4; x2t_video takes it"),
        ([], "name a task"),
        (["t2i"], "task t2i needs a --prompt"),
    ],
)
def test_bad_input_to_asking_is_one_line(refused, tmp_path, media, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    arguments = [media / value if (media / value).is_file() else value for value in arguments]
    assert line in refused("generate", *arguments, "--model", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_noise_for_an_edit_must_fit_its_source(refused, tmp_path, checkpoint, media):
    np.save(tmp_path / "noise.npy", np.zeros((5, 48), np.float32))
    given = ["--model", checkpoint, "--image", media / "logo.png", "--prompt", "a", "--noise", tmp_path / "noise.npy"]
    line = refused("generate", "image_edit", *given, *SMALL, "-o", tmp_path / "a.png")
    assert "the noise has shape [5, 48], but 80x48 and 1 frames need [15, 48]" in line
    assert "--noise is for one output of one turn" in refused("generate", "image_edit", *given, "--prompt", "b")


def test_a_prompt_that_is_not_unicode_is_refused(refused, tmp_path):
    prompt = os.fsdecode(b"caf\xe9")
    assert "the prompt is not valid Unicode" in refused("generate", "t2i", "--model", tmp_path, "--prompt", prompt)
