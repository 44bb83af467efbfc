"""`lance-mlx train`: runs that learn, are stopped and go on, on every kind of base; and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image, ImageDraw
from safetensors.numpy import load_file

from lance_mlx import BFLOAT16, FLOAT32, Variant
from lance_mlx.checkpoint.layouts import find_checkpoint
from lance_mlx.checkpoint.recipe import recipe_of
from lance_mlx.errors import LanceError
from lance_mlx.pipeline import load
from lance_mlx.training import encoded as encoding
from lance_mlx.training.checkpointing import checkpoint_layers
from lance_mlx.training.data import read_data
from lance_mlx.training.encoded import Cache, Encoded, digests_of, encode
from lance_mlx.training.lora import Adapter, LoRASettings, add_adapters, new_pairs, pairs_of
from lance_mlx.training.loss import LossSettings
from lance_mlx.training.parts import Trained, train_parts
from lance_mlx.training.run import Training, Validated, learn_adapters
from lance_mlx.training.settings import TrainSettings
from lance_mlx.training.step import gradients

COLOURS = "red green blue yellow white black purple orange".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pictures of two shapes with captions."""
    folder = tmp_path_factory.mktemp("data")
    for index, colour in enumerate(COLOURS):
        picture = Image.new("RGB", (96, 64) if index % 2 else (64, 64), colour)
        ImageDraw.Draw(picture).rectangle((4 * index, 8, 4 * index + 20, 40), fill=COLOURS[index - 3])
        picture.save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour}\n picture ")
    (folder / "notes.md").write_text("not looked at")
    return folder


def encoded_in(folder: Path, examples: list, checkpoint: Path, resolution: int = 64, numerics=FLOAT32) -> Encoded:
    digests = digests_of(examples)
    latents = Cache(folder, [resolution, numerics.name], digests)
    encode(examples, latents, find_checkpoint(checkpoint, Variant.IMAGE).vae(), numerics, resolution)
    return Encoded(tuple(examples), digests, latents, Cache(folder, [], digests))


@pytest.fixture(scope="module")
def encoded(data, checkpoint, tmp_path_factory) -> Encoded:
    return encoded_in(tmp_path_factory.mktemp("cache"), read_data(data), checkpoint)


def training(checkpoint, encoded, folder, numerics=FLOAT32, recipe=None, **changes) -> Training:
    pipeline = load(checkpoint, Variant.IMAGE, numerics, recipe=recipe)
    values = {"iters": 12, "batch_size": 2, "rank": 4, "learning_rate": 3e-3, "save_every": 2, "caption_dropout": 0.3}
    settings = TrainSettings("model", "data", str(folder), numerics=numerics.name, **values | changes)
    settings = settings.for_tasks({example.task for example in encoded.examples})
    return Training(settings, pipeline.model, pipeline.tokenizer, encoded)


def weights(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "adapters.safetensors")


def test_captions_and_latents_are_read_once(data, checkpoint, tmp_path, monkeypatch):
    examples = read_data(data)
    assert [Path(each.target.path).stem for each in examples] == sorted(COLOURS)
    assert examples[0].request.prompt == "a black picture"
    loads = []
    original = encoding.load_vae
    monkeypatch.setattr(encoding, "load_vae", lambda *given, **options: loads.append(1) or original(*given, **options))
    first = encoded_in(tmp_path, examples, checkpoint)
    again = encoded_in(tmp_path, examples, checkpoint)
    assert len(loads) == 1 and first.digest == again.digest
    assert {again.latents[each.target]["mean"].shape[:3] for each in examples} == {(1, 4, 4), (1, 3, 5)}
    assert encoded_in(tmp_path, examples[1:], checkpoint).digest != first.digest and len(loads) == 1
    encoded_in(tmp_path, examples[:1], checkpoint, 48)
    assert len(loads) == 2 and len(list(tmp_path.iterdir())) == 9
    values = first.latents[examples[0].target]["mean"].read(mx.float32)
    kept = first.latents[examples[0].target]["mean"].path
    kept.write_bytes(kept.read_bytes()[:-10])
    again = encoded_in(tmp_path, examples, checkpoint)
    assert len(loads) == 3 and mx.array_equal(again.latents[examples[0].target]["mean"].read(mx.float32), values)


def test_a_run_that_is_stopped_ends_in_the_same_bits(checkpoint, encoded, tmp_path):
    whole = list(training(checkpoint, encoded, tmp_path / "whole").run(resume=False))
    assert [told.step for told in whole] == list(range(1, 13))
    stops, resume = iter((3, 1, 2, 5, 3)), False
    for stop in stops:
        run = training(checkpoint, encoded, tmp_path / "stopped").run(resume)
        for _ in range(stop):
            next(run)
        run.close()
        resume = (tmp_path / "stopped" / "state.safetensors").exists()
        with (tmp_path / "stopped" / "log.jsonl").open("a") as log:
            log.write('{"step": 1')
    told = list(training(checkpoint, encoded, tmp_path / "stopped").run(resume=True))
    assert told[-1].step == 12 and len(told) < 12
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert expected.keys() == found.keys() and all(np.array_equal(expected[name], found[name]) for name in expected)
    assert any(np.abs(array).max() > 1e-3 for name, array in found.items() if name.endswith("lora_b"))
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["loss"] for line in lines] == [each.loss for each in whole]


def test_a_run_goes_on_with_its_own_settings_and_data_alone(checkpoint, encoded, tmp_path):
    list(training(checkpoint, encoded, tmp_path, iters=2).run(resume=False))
    for changes, said in (({"seed": 1}, "another seed"), ({"rank": 8}, "another rank")):
        with pytest.raises(LanceError, match=said):
            next(training(checkpoint, encoded, tmp_path, iters=4, **changes).run(resume=True))
    other = replace(encoded, examples=encoded.examples[1:])
    with pytest.raises(LanceError, match="other examples"):
        next(training(checkpoint, other, tmp_path, iters=4).run(resume=True))
    with pytest.raises(LanceError, match="holds a run already"):
        next(training(checkpoint, encoded, tmp_path, iters=4).run(resume=False))
    with pytest.raises(LanceError, match="no run to go on with"):
        next(training(checkpoint, encoded, tmp_path / "new", iters=4).run(resume=True))
    assert [told.step for told in training(checkpoint, encoded, tmp_path, iters=4).run(resume=True)] == [3, 4]
    (tmp_path / "state.safetensors").write_bytes((tmp_path / "adapters.safetensors").read_bytes())
    with pytest.raises(LanceError, match="is not what a run wrote"):
        next(training(checkpoint, encoded, tmp_path, iters=6).run(resume=True))


def test_all_images_come_once_before_any_comes_again(checkpoint, encoded, tmp_path):
    run = training(checkpoint, encoded, tmp_path)
    places = [run._place(index, 8) for index in range(24)]
    rounds = [places[start : start + 8] for start in (0, 8, 16)]
    assert all(sorted(each) == list(range(8)) for each in rounds) and rounds[0] != rounds[1]
    packs = [run.pack(step) for step in range(40)]
    dropped = [len(sample.sequence.segments) for pack in packs for sample, _ in pack]
    assert set(dropped) == {4, 5} and 0.1 < dropped.count(4) / 80 < 0.5
    times = [drawn.time for pack in packs for _, drawn in pack]
    assert len(set(times)) == 80 and abs(np.mean(times)) < 0.4 and 0.7 < np.std(times) < 1.3


@pytest.mark.parametrize("base", ["float32", "bfloat16", "quantized"])
def test_it_learns_on_every_base(checkpoint, encoded, tmp_path, base):
    numerics, recipe = (FLOAT32 if base == "float32" else BFLOAT16), recipe_of(8) if base == "quantized" else None
    options = {"iters": 24, "tower": "both", "rank": 8, "caption_dropout": 0.0}
    losses = [each.loss for each in training(checkpoint, encoded, tmp_path, numerics, recipe, **options).run(False)]
    assert np.mean(losses[-6:]) < 0.75 * np.mean(losses[:3])


def packed(run: Training):
    samples, draws = zip(*run.pack(0), strict=True)
    return gradients(run.model, samples, draws, LossSettings(), len(run.tokenizer))


def test_layers_that_compute_again_give_the_same_gradients(checkpoint, encoded, tmp_path):
    def found(again: bool):
        run = training(checkpoint, encoded, tmp_path)
        if again:
            checkpoint_layers(run.model)
        pairs = new_pairs(run.model, LoRASettings(4, tower="both"), mx.random.key(1))
        add_adapters(run.model, [Adapter("x", {p: pair._replace(b=pair.b + 0.01) for p, pair in pairs.items()})])
        learn_adapters(run.model)
        return packed(run)

    (kept, plain), (computed, again) = found(False), found(True)
    assert kept.loss.item() == pytest.approx(computed.loss.item(), rel=1e-6)
    assert plain.keys() == again.keys() and len(plain) == 2 * 42
    for name, gradient in plain.items():
        np.testing.assert_allclose(np.array(again[name]), np.array(gradient), rtol=1e-4, atol=1e-7)
    assert sum(np.abs(np.array(gradient)).max() > 1e-5 for gradient in plain.values()) > 60


def test_an_adapters_gradient_is_that_of_the_weights_that_it_adds_to(checkpoint, encoded, tmp_path):
    run, fused = (training(checkpoint, encoded, tmp_path) for _ in range(2))
    pairs = new_pairs(run.model, LoRASettings(3, 6.0, tower="both"), mx.random.key(1))
    pairs = {
        path: pair._replace(b=0.1 * mx.random.normal(pair.b.shape, key=mx.random.key(2)))
        for path, pair in pairs.items()
    }
    add_adapters(run.model, [Adapter("x", pairs)])
    learn_adapters(run.model)
    before = dict(tree_flatten(fused.model.parameters()))
    added = [(f"{path}.weight", before[f"{path}.weight"] + pair.delta()) for path, pair in pairs_of(run.model).items()]
    fused.model.load_weights(added, strict=False)
    train_parts(fused.model, Trained())
    _, own = packed(run)
    _, whole = packed(fused)
    for path, pair in pairs.items():
        weight = np.array(whole[f"{path}.weight"], np.float64)
        for name, expected in (
            ("lora_a", pair.scale * weight.T @ np.array(pair.b, np.float64).T),
            ("lora_b", pair.scale * np.array(pair.a, np.float64).T @ weight.T),
        ):
            error = np.linalg.norm(np.array(own[f"{path}.{name}"]) - expected)
            assert error <= 2e-5 * np.linalg.norm(expected) + 1e-9, (path, name)


def test_the_command_learns_what_generate_uses(invoke, refused, checkpoint, data, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model": str(checkpoint), "data": str(data), "resolution": 64, "numerics": "float32",
                                  "targets": ["q_proj*"], "alpha": 8, "iters": 9, "save_every": 2}))  # fmt: skip
    adapter = tmp_path / "adapter"
    done = invoke("train", "--config", config, "--adapter-path", adapter, "--iters", 4, "--rank", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{adapter / 'adapters.safetensors'}: 4 steps"
    values = json.loads((adapter / "adapter_config.json").read_text())
    assert values["lora_parameters"]["scale"] == 4.0 and values["iters"] == values["step"] == 4
    assert len(weights(adapter)) == 2 * 3
    assert "holds a run already" in refused("train", "--config", config, "--adapter-path", adapter)
    done = invoke("train", "--config", config, "--adapter-path", adapter, "--iters", 5, "--rank", 2, "--resume",
                  "--grad-checkpoint")  # fmt: skip
    assert done.returncode == 0 and len((adapter / "log.jsonl").read_text().splitlines()) == 5
    drawn = invoke("generate", "t2i", "--model", checkpoint, "--prompt", "a red picture", "--width", 32, "--height", 32,
                   "--steps", 1, "--lora", adapter, "-o", tmp_path / "a.png")  # fmt: skip
    assert drawn.returncode == 0, drawn.stderr


def test_validation_and_previews_are_the_same_after_a_stop(checkpoint, encoded, tmp_path):
    drawn, stops = [], []

    def draws(step: int) -> None:
        if stops:
            raise InterruptedError(stops.pop())
        drawn.append(step)

    def begun(name) -> Training:
        run = training(checkpoint, encoded, tmp_path / name, iters=4, save_every=2, steps_per_eval=2, sample_every=2)
        return replace(run, validation=replace(encoded, examples=encoded.examples[:3]), preview=draws)

    whole = [each for each in begun("whole").run(False) if isinstance(each, Validated)]
    assert [each.step for each in whole] == [0, 2, 4] and drawn == [2, 4]
    assert all(each.val_loss == each.val_mse > 0 == each.val_ce for each in whole)
    run = begun("still")
    assert run._validate(0).val_loss == run._validate(3).val_loss == whole[0].val_loss != whole[1].val_loss
    drawn.clear()
    # Stopped while something is drawn: nothing of the step is kept, and it is looked at and drawn again.
    stopped = begun("stopped").run(False)
    for _ in range(4):
        next(stopped)
    stops.append("here")
    with pytest.raises(InterruptedError):
        list(stopped)
    assert drawn == [2]
    list(begun("stopped").run(True))
    assert drawn == [2, 4]

    def logged(name) -> list:
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    assert logged("whole") == logged("stopped") and len(logged("whole")) == 7
    # Neither changes what is learned.
    list(training(checkpoint, encoded, tmp_path / "alone", iters=4, save_every=2).run(False))
    assert all(np.array_equal(weights(tmp_path / "alone")[n], a) for n, a in weights(tmp_path / "whole").items())


def test_the_command_validates_and_draws(invoke, refused, checkpoint, data, tmp_path):
    values = {"model": str(checkpoint), "data": str(data), "val_data": str(data), "resolution": 32, "iters": 2,
              "numerics": "float32", "adapter_path": str(tmp_path / "a"),
              "sample_prompts": ["a cat", "a dog"]}  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(values))
    done = invoke("train", "-c", tmp_path / "c.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 2
    samples = tmp_path / "a" / "samples"
    assert sorted(path.name for path in samples.iterdir()) == ["000002-1.png", "000002-2.png"]
    assert Image.open(samples / "000002-1.png").size == (32, 32)
    (samples / "000004-1.png").write_text("not ours")
    assert invoke("train", "-c", tmp_path / "c.json", "--resume", "--iters", 4).returncode == 0
    assert len(list(samples.iterdir())) == 4 and (samples / "000004-1.png").read_text() == "not ours"
    (tmp_path / "a" / "state.safetensors").unlink()
    assert "holds drawings already" in refused("train", "-c", tmp_path / "c.json")


REFUSED = {
    "no data": ({"data": "nowhere"}, "data nowhere is neither a folder"),
    "unknown key": ({"epochs": 3}, "unknown key 'epochs'"),
    "another type": ({"iters": "many"}, "'iters' must be an integer"),
    "none at all": ({"iters": 0}, "iters 0 must be at least 1"),
    "no caption": ({"data": "bare"}, "has no caption"),
    "empty caption": ({"data": "empty"}, "is empty"),
    "no image": ({"data": "void"}, "holds no image"),
    "wrong targets": ({"targets": ["nothing"]}, "match no layer"),
    "wrong tower": ({"tower": "left"}, "tower 'left' must be one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused(refused, checkpoint, data, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    for name in ("bare", "empty", "void"):
        (tmp_path / name).mkdir()
        if name != "void":
            Image.new("RGB", (64, 64)).save(tmp_path / name / "a.png")
    (tmp_path / "empty" / "a.txt").write_text(" \n")
    changes, said = REFUSED[case]
    values = {"model": str(checkpoint), "data": str(data), "resolution": 64, "iters": 2}
    (tmp_path / "config.json").write_text(json.dumps(values | changes))
    assert said in refused("train", "--config", "config.json", "--adapter-path", "adapter")
    assert not (tmp_path / "adapter" / "adapters.safetensors").exists()


def test_a_model_and_data_must_be_named(refused, checkpoint):
    assert "--model is missing" in refused("train")
    assert "--data is missing" in refused("train", "--model", checkpoint)
