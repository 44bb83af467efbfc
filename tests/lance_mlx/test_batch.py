"""Several pictures side by side: each is what it is alone, in as many passes as one takes."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from lance_mlx import LanceError, Request, load
from lance_mlx.cli import drawing as cli_drawing
from lance_mlx.media.write import read_metadata
from lance_mlx.sampling import flow
from lance_mlx.sampling.batch import batches, default_size

BOUNDS = {"float32": 1e-5, "bfloat16": 0.05}
BIRD = {"task": "t2i", "prompt": "a bird", "width": 48, "height": 32, "num_steps": 4}


def requests(**changes: object) -> list[Request]:
    """Two prompts with two seeds each."""
    prompts = ("a bird", "a red cat on a mat")
    return [
        Request.from_dict(BIRD | {"prompt": prompt, "seed": seed} | changes) for prompt in prompts for seed in (1, 2)
    ]


def error(first: mx.array, second: mx.array) -> float:
    a, b = (np.array(x.astype(mx.float32)) for x in (first, second))
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request, checkpoint):
    return load(checkpoint, request.param)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"entry": "full_sequence", "guidance_renorm": "channel"},
        {"scheduler": "heun", "negative_prompt": "a fish"},
        {"scheduler": "dpm++2m", "guidance_scale": 1.0},
        {"task": "t2v", "num_frames": 5},
    ],
    ids=str,
)
def test_every_picture_of_a_batch_is_what_it_is_alone(model, changes):
    asked = requests(**changes)
    together = model.generate_batch(asked)
    assert [each.request for each in together] == asked
    # Products of other shapes add up in another order. Measured: up to 1.4e-6, and in bfloat16 0.013.
    bound = BOUNDS[model.numerics.name]
    for request, made in zip(asked, together, strict=True):
        assert error(model.generate(request).latents, made.latents) <= bound
    # Far more than that lies between any two of them.
    assert error(together[0].latents, together[1].latents) > 0.1 < error(together[0].latents, together[2].latents)


def test_pictures_with_sources_go_together(checkpoint, media):
    model = load(checkpoint, "float32")
    given = {"task": "image_edit", "vae_resolution": 64, "vit_resolution": 56, "num_steps": 2, "prompt": "blue"}
    visuals = [[{"path": str(media / name), "kind": "image"}] for name in ("logo.png", "logo.png")]
    asked = [Request.from_dict(given | {"visuals": own, "seed": seed}) for seed, own in enumerate(visuals)]
    for request, made in zip(asked, model.generate_batch(asked), strict=True):
        alone = model.generate(request)
        assert made.request == alone.request and error(alone.latents, made.latents) <= BOUNDS["float32"]


def test_a_batch_takes_the_passes_of_one_picture_and_reads_each_prompt_once(checkpoint, monkeypatch):
    model, passes, read = load(checkpoint, "float32"), [], []
    real_pass, real_read = flow.velocities_of_pass, flow.Arm.prefill
    monkeypatch.setattr(flow, "velocities_of_pass", lambda *given: passes.append(len(given[1])) or real_pass(*given))
    monkeypatch.setattr(flow.Arm, "prefill", lambda *given: read.append(1) or real_read(*given))
    model.generate(requests()[0])
    alone = len(passes), len(read)
    passes.clear(), read.clear()
    model.generate_batch(requests())
    assert (len(passes), len(read)) == (alone[0], 2 * alone[1])
    assert set(passes) == {8}
    # What is asked for goes in one pass, however much it is.
    monkeypatch.setattr(flow, "goes_in_one_pass", lambda *given: False)
    passes.clear()
    model.generate_batch(requests())
    assert set(passes) == {8}


def test_a_callback_sees_every_picture_and_ends_the_batch(checkpoint):
    seen = []
    made = load(checkpoint, "float32").generate_batch(requests(), lambda steps: seen.append(len(steps)) or False)
    assert seen == [4] and {each.stopped_after for each in made} == {1}


@pytest.mark.parametrize("other", [{"num_steps": 5}, {"width": 32}, {"scheduler": "heun"}, {"guidance_scale": 3.0}])
def test_what_differs_in_more_is_no_batch(checkpoint, other):
    asked = [Request.from_dict(BIRD), Request.from_dict(BIRD | other)]
    with pytest.raises(LanceError, match="one size and one set of options"):
        load(checkpoint, "float32").generate_batch(asked)
    assert [len(batch) for batch in batches(asked, lambda each: each, None)] == [1, 1]


def test_small_pictures_go_together_by_default_and_large_ones_do_not(monkeypatch):
    monkeypatch.setattr("lance_mlx.sampling.batch.runs_on_cpu", lambda: True)
    sizes = {side: default_size(Request.from_dict(BIRD | {"width": side, "height": side})) for side in (64, 256, 768)}
    assert sizes == {64: 8, 256: 4, 768: 1}
    asked = [Request.from_dict(BIRD | {"seed": seed}) for seed in range(10)]
    assert [len(batch) for batch in batches(asked, lambda each: each, None)] == [8, 2]
    assert [len(batch) for batch in batches(asked, lambda each: each, 1)] == [1] * 10
    animated = {"task": "i2v", "num_frames": 5, "visuals": [{"path": "a.png", "kind": "image"}]}
    assert [len(each) for each in batches([Request.from_dict(BIRD | animated)] * 2, lambda each: each, 4)] == [1, 1]


def test_edits_of_several_turns_are_made_one_after_the_other(invoke, checkpoint, media, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes, original = [], cli_drawing.draw
    monkeypatch.setattr(cli_drawing, "draw", lambda *given: sizes.append(len(given[1])) or original(*given))
    given = ["image_edit", "--model", checkpoint, "--image", media / "logo.png", "--vae-resolution", 64, "--steps", 1]
    given += ["--vit-resolution", 56, "--prompt", "blue", "--seed", 1, 2, "-o", "hat.png", "--overwrite"]
    for turns, expected in ((["--prompt", "a hat"], [1, 1]), ([], [2])):
        sizes.clear()
        done = invoke("generate", *given, *turns)
        assert done.returncode == 0, done.stderr
        assert sizes == expected


def test_the_command_makes_batches_of_the_size_that_is_asked_for(invoke, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes, original = [], cli_drawing.draw
    monkeypatch.setattr(cli_drawing, "draw", lambda *given: sizes.append(len(given[1])) or original(*given))
    drawing = ["--width", 48, "--height", 32, "--steps", 2, "--model", checkpoint, "-Q"]
    for option, expected in (([], [3]), (["--batch-size", 2], [2, 1]), (["--batch-size", 1], [1, 1, 1])):
        sizes.clear()
        given = ["t2i", "--prompt", "a bird", "--seed", 1, 2, 3, "--overwrite", "--stepwise-output-dir", "steps"]
        assert invoke("generate", *given, "-o", "bird.png", *option, *drawing).returncode == 0
        assert sizes == expected
    assert [read_metadata(f"bird-{seed}.png")["request"]["seed"] for seed in (1, 2, 3)] == [1, 2, 3]
    assert len(list(Path("steps").iterdir())) == 6
    sizes.clear()
    Path("t2i.json").write_text('{"1.png": "a bird", "2.png": "a cat"}', encoding="utf-8")
    assert invoke("generate", "--requests", "t2i.json", *drawing).returncode == 0
    assert sizes == [2] and len(list(Path("t2i").glob("*.png"))) == 2
