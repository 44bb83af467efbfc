"""Requests and configurations: what is refused, and that the line says why."""

import json

import pytest

from lance_mlx import Entry, LanceError, Renorm, Request, Task
from lance_mlx.config import LanceConfig


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"height": 100}, "height 100 must be a multiple of 16 up to 1024: try 96"),
        ({"width": 8}, "width 8 must be a multiple of 16"),
        ({"width": 1040}, "width 1040 must be a multiple of 16 up to 1024: try 1024"),
        ({"num_frames": 0}, "num_frames 0 must be between 1 and 121"),
        ({"num_frames": 122}, "num_frames 122 must be between 1 and 121"),
        ({"num_steps": 0}, "num_steps 0 must be at least 1"),
        ({"timestep_shift": 0.0}, "timestep_shift 0.0 must be greater than 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan must be a finite number"),
        ({"guidance_renorm_min": 1.5}, "guidance_renorm_min 1.5 must be between 0 and 1"),
        ({"fps": 0}, "fps 0 must be at least 1"),
        ({"seed": -1}, "seed -1 must be at least 0"),
        ({"prompt": "a <|vision_start|> b"}, "control token <|vision_start|>"),
        ({"task": "paint"}, "task 'paint' is not supported: choose one of t2i, t2v, i2v"),
        ({"task": "t2i", "num_frames": 9}, "task t2i makes one frame, not 9"),
        ({"guidance_renorm": "local"}, "guidance_renorm 'local' is not supported"),
        ({"colour": 1}, "unknown request key 'colour'"),
        ({"height": "64"}, "height must be an integer, not '64'"),
        ({"num_steps": True}, "num_steps must be an integer, not True"),
        ({"num_frames": 2.5}, "num_frames must be an integer, not 2.5"),
        ({"timestep_shift": "3"}, "timestep_shift must be a number, not '3'"),
        ({"text_template": "yes"}, "text_template must be true or false, not 'yes'"),
        ({"prompt": 3}, "prompt must be text, not 3"),
        ({"guidance_interval": [1]}, "guidance_interval must hold 2 values, not 1"),
        ({"visuals": ["x.png"]}, "'x.png' must be an object with the keys of a visual"),
        ({"visuals": [{"path": "x.png"}]}, "the visual key 'kind' is missing"),
        ({"visuals": [{"path": "x.png", "kind": "image"}]}, "task t2v takes no image or video"),
        ({"task": "i2v"}, "task i2v needs an image: name its file"),
        (
            {"task": "i2v", "num_frames": 4, "visuals": [{"path": "x.png", "kind": "image"}]},
            "num_frames 4 leaves nothing to animate",
        ),
    ],
)
def test_bad_requests_are_refused_with_a_line_that_names_the_value(values, line):
    with pytest.raises(LanceError) as error:
        Request.from_dict({"task": "t2v", "prompt": "a bird", "num_frames": 9} | values)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_request_survives_json():
    request = Request(
        Task.T2V, "a bird\nflies", 48, 64, 9, guidance_renorm=Renorm.CHANNEL, entry=Entry.FULL_SEQUENCE, seed=7
    )
    assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request


def test_visuals_are_resized_as_upstream_does_for_the_task_unless_told_otherwise():
    image, video = ({"path": "x", "kind": kind} for kind in ("image", "video"))
    sizes = {}
    for task, visual in (("image_edit", image), ("i2v", image), ("video_edit", video)):
        frames = 9 if task == "i2v" else 1
        request = Request.from_dict({"task": task, "prompt": "", "num_frames": frames, "visuals": [visual]})
        sizes[task] = request.vae_resolution, request.vit_resolution
        assert Request.from_dict(request.to_dict()) == request
    assert sizes == {"image_edit": (768, 672), "i2v": (640, 616), "video_edit": (640, 616)}
    assert (
        Request.from_dict({"task": "image_edit", "prompt": "", "visuals": [image], "vae_resolution": 64}).vae_resolution
        == 64
    )


def test_frames_between_chunks_round_down_to_whole_latent_frames():
    grids = {frames: Request(Task.T2V, "", 16, 16, frames).latent_grid[0] for frames in (1, 4, 5, 8, 9, 50, 121)}
    assert grids == {1: 1, 4: 1, 5: 2, 8: 2, 9: 3, 50: 13, 121: 31}


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"rotary_dim": 4}, "unknown key 'rotary_dim'"),
        ({"hidden_size": None}, "'hidden_size' must be an integer"),
        ({"hidden_size": "64"}, "'hidden_size' must be an integer from 1 to 16777216, not '64'"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"head_dim": 32}, "head_dim 32 contradicts"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ({"qk_norm": False}, "'qk_norm' is False"),
        ({"rope_scaling": {"mrope_section": [2, 3, 4]}}, "must add up to head_dim / 2 = 8"),
        ({"rope_scaling": None}, "rope_scaling.mrope_section must be a list"),
        ({"rope_theta": -1}, "'rope_theta' must be a positive number"),
        ({"rope_theta": 10**400}, "'rope_theta' must be a positive number"),
        ({"rms_norm_eps": float("inf")}, "'rms_norm_eps' must be a positive number"),
        ({"num_hidden_layers": 2**31}, "'num_hidden_layers' must be an integer from 1 to 1000"),
    ],
)
def test_bad_configurations_are_refused(checkpoint_copy, values, line):
    checkpoint_copy.edit_config(**values)
    with pytest.raises(LanceError) as error:
        LanceConfig.from_file(checkpoint_copy.variant / "llm_config.json")
    assert line in str(error.value)
    assert "llm_config.json" in str(error.value)


def test_a_configuration_that_is_not_json_is_refused(checkpoint_copy):
    path = checkpoint_copy.variant / "llm_config.json"
    path.write_text("{")
    with pytest.raises(LanceError, match="not readable JSON"):
        LanceConfig.from_file(path)
