"""The `lance-mlx` command, as a user runs it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lance_mlx import Task
from lance_mlx.media.write import read_metadata, to_uint8

COMMAND = Path(sys.executable).parent / "lance-mlx"
SMALL = ["--width", "96", "--height", "64", "--steps", "4", "--numerics", "float32"]


def test_replayed_noise_gives_upstreams_image(run, tmp_path, checkpoint, oracles):
    taps = oracles / "t2i-fp32-kv" / "taps.safetensors"
    prompt = "a small red bird sits on a wooden fence"
    output = tmp_path / "bird.png"
    done = run("generate", "t2i", "--model", checkpoint, "--prompt", prompt, "--noise", taps, "-o", output, *SMALL)
    assert done.returncode == 0, done.stderr
    expected = to_uint8(load_file(taps)["pixels"][:, 0].permute(1, 2, 0).numpy())
    difference = np.abs(np.asarray(Image.open(output)).astype(int) - expected)
    # A pixel may lie on the edge between two of the 256 values.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3
    assert "96x64, 1 frame, float32" in done.stdout
    assert "s a step" in done.stdout
    assert "peak memory" in done.stdout
    assert done.stderr.splitlines()[1:] == ["reading: 5 parts", "denoising: 4 steps", "decoding: 1 frame"]
    written = read_metadata(output)
    assert written["request"]["prompt"] == prompt
    assert written["request"]["height"] == 64
    assert written["numerics"] == "float32"
    assert written["noise"] == str(taps)


def test_a_video_has_its_frames_its_rate_and_its_request(run, tmp_path, checkpoint):
    output = tmp_path / "bird.mp4"
    arguments = ["--num-frames", 9, "--fps", 6, "--steps", 2, "--width", 64, "--height", 48, "-Q"]
    done = run("generate", "t2v", "--model", checkpoint, "--prompt", "a bird", "-o", output, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with av.open(str(output)) as video:
        stream = video.streams.video[0]
        assert stream.average_rate == 6
        assert [frame.to_ndarray(format="rgb24").shape for frame in video.decode(stream)] == [(48, 64, 3)] * 9
    written = read_metadata(output)
    assert written["request"]["num_frames"] == 9
    assert written["numerics"] == "bfloat16"


def test_the_same_seed_gives_the_same_file_and_another_seed_does_not(run, tmp_path, checkpoint):
    pictures = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / f"{name}.png"
        assert (
            run("generate", "t2i", "--model", checkpoint, "--prompt", "", "--seed", seed, "-o", path, *SMALL).returncode
            == 0
        )
        pictures.append(np.asarray(Image.open(path)))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_three_thousand_tokens_and_an_empty_prompt_both_draw(run, tmp_path, checkpoint):
    for prompt in (" bird" * 3000, ""):
        path = tmp_path / "bird.png"
        done = run("generate", "t2i", "--model", checkpoint, "--prompt", prompt, "-o", path, *SMALL)
        assert done.returncode == 0, done.stderr
        path.unlink()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--height", "100"], "height 100 must be a multiple of 16"),
        (["--num-frames", "0"], "--num-frames 0 must be between 1 and 121"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--model", "nowhere"], "model folder nowhere does not exist"),
        (["--model", __file__], f"model {__file__} is no folder"),
        (["--numerics", "float8"], "unknown numerics 'float8'"),
        (["--noise", "nowhere.npy"], "noise file nowhere.npy does not exist"),
        (["--output", "bird.bmp"], "bird.bmp"),
        (["--prompt", "and another"], "task t2v takes one --prompt"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(refused, tmp_path, checkpoint, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    given = ["--model", checkpoint, "--prompt", "a bird", "--output", "bird.mp4", "--width", "32", "--height", "32"]
    assert line in refused("generate", "t2v", *given, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_stands_for_pixels_is_refused(refused, tmp_path, checkpoint):
    given = ["--model", checkpoint, "--prompt", "a <|video_pad|>", "--output", tmp_path / "bird.mp4"]
    assert "control token <|video_pad|>" in refused("generate", "t2v", *given)
    assert list(tmp_path.iterdir()) == []


def test_noise_of_another_size_is_refused_before_the_model_is_read(refused, tmp_path, oracles):
    taps = oracles / "t2i-fp32-kv" / "taps.safetensors"
    line = refused("generate", "t2i", "--model", tmp_path, "--prompt", "", "--noise", taps, "-o", tmp_path / "a.png")
    assert "the noise has shape [24, 48]" in line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("generate t2i --seed 1.5", "--seed '1.5' should be a valid integer"),
        ("generate t2i --seed abc", "--seed 'abc' should be a valid integer"),
        ("generate t2i --guidance-interval 0 high", "--guidance-interval 'high' should be a valid number"),
        ("generate t2i --batch-size 0", "--batch-size '0' should be greater than or equal to 1"),
        ("generate t2i --scheduler ddim", "--scheduler 'ddim' is not one of 'euler', 'heun', 'dpm++2m', 'unipc'."),
        ("generate paint", f"TASK 'paint' is not one of {', '.join(Task)}."),
        ("generate t2i", "Missing option '--model'; lance-mlx generate -h lists what there is"),
        ("generate --sead 1", "No such option: --sead"),
        ("generate --seed", "Option '--seed' requires an argument; lance-mlx -h lists what there is"),
        ("generate t2i t2v --model x", "Got unexpected extra argument(s) (t2v); lance-mlx generate -h lists"),
        ("benchmark other", "BENCHMARK 'other' is not one of 'geneval', 'dpg', 'gedit', 'vbench'."),
        ("serve --model x --port 70000", "--port '70000' should be less than or equal to 65535"),
        ("zzz", "No such command 'zzz'; lance-mlx -h lists what there is"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line(invoke, arguments, line):
    done = invoke(*arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"lance-mlx: {line}")
    assert done.stderr.count("\n") == 1


def test_the_command_alone_tells_what_there_is(invoke):
    assert invoke() == invoke("--help")
    assert "Commands:" in invoke().stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_run_leaves_nothing(tmp_path, checkpoint, number, status):
    arguments = ["--width", "512", "--height", "512", "--num-frames", "49", "--steps", "1000"]
    command = [COMMAND, "generate", "t2v", "--model", checkpoint, "--prompt", "a", "-o", tmp_path / "a.mp4", *arguments]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    shown = ""
    while "denoising" not in shown:
        assert running.poll() is None, shown
        shown += running.stderr.read(1)
    running.send_signal(number)
    _, errors = running.communicate(timeout=600)
    assert running.returncode == status
    assert "interrupted, nothing written" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_file_goes_when_the_run_is_terminated(invoke, tmp_path, checkpoint, monkeypatch):
    def save(image: Image.Image, path: Path, **options: object) -> None:
        assert path.is_file()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Image.Image, "save", save)
    before = signal.getsignal(signal.SIGTERM)
    given = ["--model", checkpoint, "--prompt", "a", "-o", tmp_path / "a.png", "-Q"]
    done = invoke("generate", "t2i", *given, *SMALL)
    assert (done.returncode, done.stderr) == (143, "lance-mlx: interrupted, nothing written\n")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_vae_converts_once(run, refused, tmp_path, checkpoint):
    output = tmp_path / "Wan2.2_VAE.safetensors"
    done = run("convert-vae", checkpoint / "Wan2.2_VAE.pth", output)
    assert done.returncode == 0, done.stderr
    original = torch.load(checkpoint / "Wan2.2_VAE.pth", weights_only=True)
    converted = load_file(output)
    assert original.keys() == converted.keys()
    assert all(torch.equal(original[name], converted[name]) for name in original)
    assert "is missing" in refused("convert-vae", tmp_path / "nowhere.pth", tmp_path / "other.safetensors")
    assert "is there already" in refused("convert-vae", checkpoint / "Wan2.2_VAE.pth", output)
    assert "must end in .safetensors" in refused("convert-vae", checkpoint / "Wan2.2_VAE.pth", tmp_path / "vae.bin")


def test_help_names_every_option(run):
    text = run("generate", "--help").stdout
    options = """model prompt image video question instruction requests output seed steps guidance width height
        num-frames resolution vae-resolution vit-resolution reencode fps max-tokens temp top-p rewrite variant
        vit-source noise numerics entry quiet""".split()
    assert all(f"--{option}" in text for option in options)
    assert "--guidance-interval LOW HIGH " in text
    assert "Exit status" in text


def test_a_shell_completes_options(invoke, monkeypatch):
    assert "--install-completion" in invoke("-h").stdout
    typed = {"COMP_WORDS": "lance-mlx generate t2i --num", "COMP_CWORD": "3", "_LANCE_MLX_COMPLETE": "complete_bash"}
    for name, value in typed.items():
        monkeypatch.setenv(name, value)
    assert invoke().stdout.split() == ["--num-images", "--num-frames", "--numerics"]
