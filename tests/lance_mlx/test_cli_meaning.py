"""Options that would be ignored: each is refused with one line, for every task that it means nothing to."""

import pytest

from lance_mlx import Task

VALUES = {
    "reencode": [], "resolution": ["image_256res"], "vae-resolution": [64], "vit-resolution": [56], "fps": [6],
    "num-frames": [9], "width": [64], "height": [64], "vit-source": ["vit_file"], "steps": [3], "guidance": [3],
    "guidance-interval": [0.2, 0.8], "guidance-renorm": ["none"], "guidance-renorm-min": [0.5], "text-template": [],
    "timestep-shift": [2], "noise": ["noise.npy"], "negative-prompt": ["x"], "scheduler": ["heun"], "max-tokens": [5],
    "stepwise-output-dir": ["steps"], "question": ["x"], "instruction": ["x"], "temp": [1], "top-p": [0.5],
    "rewrite": [], "as-upstream": [], "vae-tiling": [384], "strength": [0.5], "num-images": [2],
}  # fmt: skip
DRAWN, EDITS = {task for task in Task if not task.answers}, {Task.IMAGE_EDIT, Task.VIDEO_EDIT}
SEEN = {task for task in Task if task.takes}
MEANT = {
    **dict.fromkeys(VALUES, DRAWN),
    **dict.fromkeys(("question", "instruction", "temp", "top-p", "max-tokens"), {Task.X2T_IMAGE, Task.X2T_VIDEO}),
    **dict.fromkeys(("reencode", "strength"), EDITS),
    **dict.fromkeys(("resolution", "as-upstream"), SEEN),
    "vae-resolution": SEEN & DRAWN,
    "vit-resolution": SEEN - {Task.I2V},
    "vit-source": SEEN - {Task.I2V},
    "fps": {Task.T2V, Task.I2V, Task.VIDEO_EDIT, Task.SUBJECT},
    "num-frames": {Task.T2V, Task.I2V, Task.SUBJECT},
    "width": {Task.T2I, Task.T2V, Task.SUBJECT},
    "height": {Task.T2I, Task.T2V, Task.SUBJECT},
    "rewrite": {Task.T2V, Task.I2V},
}


@pytest.mark.parametrize("option", VALUES)
def test_an_option_is_refused_by_the_tasks_that_it_means_nothing_to(refused, tmp_path, option):
    for task in Task:
        # Neither a model nor visuals are there: whatever else is wrong comes later.
        line = refused("generate", task, "--model", tmp_path, f"--{option}", *VALUES[option])
        assert (f"--{option} means nothing to task {task}" in line) == (task not in MEANT[option]), line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["image_edit", "--reencode", "--prompt", "a"], "--reencode is between turns: give a further --prompt"),
        (["subject", "--fps", "6", "--prompt", "a"], "--fps is for a video: give --num-frames"),
        (["subject", "--fps", "6", "--num-frames", "1", "--prompt", "a"], "--fps is for a video"),
        (["t2i", "--guidance", "1", "--guidance-interval", "0", "1"], "--guidance-interval acts through guidance"),
        (["t2i", "--guidance", "0.5", "--negative-prompt", "x"], "--negative-prompt acts through guidance"),
        (["t2i", "--guidance-renorm", "none", "--guidance-renorm-min", "0.5"], "--guidance-renorm-min is for a renorm"),
        (["x2t_image", "--top-p", "0.5"], "--top-p is for answers that are drawn: give a --temp above 0"),
        (["x2t_video", "--seed", "3"], "--seed is for answers that are drawn"),
        (
            ["t2i", "--prompt", "a", "--guidance-interval", "0.9", "0.4"],
            "--guidance-interval 0.9 0.4 holds no t between",
        ),
        (["t2i", "--prompt", "a", "--guidance-interval", "1", "2"], "--guidance-interval 1.0 2.0 holds no t between"),
        (["t2i", "--prompt", "a" * 100_000], "the prompt has 100,000 characters and may have at most 32,768"),
        (["t2i", "--prompt", "a", "--negative-prompt", "a" * 40_000], "the negative prompt has 40,000 characters"),
        (["x2t_image", "--question", "a" * 40_000], "the question has 40,000 characters"),
        (
            ["x2t_image", "--image", "x.png", "--max-tokens", "100000000"],
            "--max-tokens 100000000 must be at most 32768",
        ),
        (["t2i", "--prompt", "a", "--steps", "100000000"], "--steps 100000000 must be at most 1000: a step of more"),
        (["t2i", "--prompt", "a", "--guidance", "nan"], "--guidance nan must be a finite number"),
        (["t2i", "--prompt", "a", "--guidance-interval", "0", "nan"], "--guidance-interval 0.0 nan must be two finite"),
        (["image_edit", "--image", "x", "--prompt", "a", "--strength", "0"], "--strength 0.0 must be above 0"),
        (["t2i", "--prompt", "a", "-q", "8", "--low-ram"], "--low-ram would quantize every layer anew"),
        (["t2v", "--prompt", "a", "--fps", "100000"], "--fps 100000 must be at most 240"),
        (
            ["i2v", "--image", "x", "--prompt", "a", "--vae-resolution", "100000"],
            "100000 must be at most 4096: a source",
        ),
    ],
)
def test_what_could_not_act_or_would_never_end_is_refused(refused, tmp_path, arguments, line):
    assert line in refused("generate", *arguments, "--model", tmp_path)


def test_info_refuses_what_means_nothing_to_its_task(refused):
    for option in ("width", "height", "steps", "guidance"):
        assert f"--{option} means nothing to task x2t_image" in refused(
            "info", "--task", "x2t_image", f"--{option}", 64
        )
    assert "--num-frames means nothing to task t2i" in refused("info", "--task", "t2i", "--num-frames", 1)
    unguided = ["info", "--task", "t2i", "--guidance", 1, "--guidance-interval", 0, 1]
    assert "--guidance-interval acts through guidance" in refused(*unguided)


def test_the_subject_driven_task_has_upstreams_name_as_well(refused, tmp_path):
    assert "task subject needs an image" in refused("generate", "idip", "--prompt", "a", "--model", tmp_path)
    assert Task("idip") is Task.SUBJECT
