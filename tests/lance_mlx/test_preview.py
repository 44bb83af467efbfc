"""Previews: the linear map that is fitted to the VAE, and what a step's latents are heading for."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from lance_mlx import BFLOAT16, FLOAT32, LanceError, Request, Task, Variant, ViTSource
from lance_mlx.checkpoint.convert import convert_vae, prepare
from lance_mlx.checkpoint.layouts import find_checkpoint, read_vae
from lance_mlx.checkpoint.preview import from_text, to_text
from lance_mlx.pipeline import load
from lance_mlx.sampling.preview import clean_estimate, fit_preview, preview


class Linear:
    """A VAE whose cells have one colour, a linear map of their channels."""

    def __init__(self) -> None:
        self.weights = np.random.default_rng(0).normal(0, 0.02, (49, 3)).astype(np.float32)

    def decode(self, latents: mx.array):
        colours = np.array(latents) @ self.weights[:48] + self.weights[48]
        yield mx.array(colours.repeat(16, 1).repeat(16, 2))


def test_a_linear_vae_is_found_and_shown():
    vae = Linear()
    weights = fit_preview(vae)
    assert np.allclose(weights, vae.weights, atol=1e-5)
    latents = mx.random.normal((2, 3, 5, 48), key=mx.random.key(1))
    shown = preview(weights, latents.reshape(-1, 48), (2, 3, 5))
    assert shown.shape == (24, 80, 3) and shown.dtype == np.uint8
    (decoded,) = vae.decode(latents[1:])
    expected = np.round((np.clip(np.array(decoded)[0, 8::16, 8::16], -1, 1) / 2 + 0.5) * 255)
    assert np.abs(shown[::8, 40::8].astype(int) - expected).max() <= 1


def test_the_last_step_is_headed_where_it_goes(pipeline):
    for entry in ("kv_cache", "full_sequence"):
        request = Request(Task.T2I, "a bird", 32, 32, num_steps=3, entry=entry)
        *_, last = pipeline.denoise(pipeline.prepare(request))
        assert np.allclose(np.array(clean_estimate(last)), np.array(last.x_next), atol=1e-5)


def converted(source: Path, to: Path) -> Path:
    found = find_checkpoint(source, Variant.IMAGE)
    prepare("it", found, to, "float32", 1 << 20, ViTSource.LANCE).run(lambda *_: lambda _: None)
    return to


def with_vae_of_its_own(source: Path, to: Path) -> Path:
    """The official layout, its VAE as convert-vae writes it."""
    to.mkdir()
    for path in source.iterdir():
        if path.suffix != ".pth":
            (to / path.name).symlink_to(path)
    convert_vae(source / "Wan2.2_VAE.pth", to / "Wan2.2_VAE.safetensors")
    return to


@pytest.fixture
def fits(monkeypatch) -> list[object]:
    """The VAEs that a map is fitted to from now on."""
    fitted = []
    for place in ("lance_mlx.pipeline", "lance_mlx.checkpoint.convert"):
        monkeypatch.setattr(f"{place}.fit_preview", lambda vae: fitted.append(vae) or fit_preview(vae))
    return fitted


@pytest.mark.parametrize("written", [converted, with_vae_of_its_own])
def test_the_map_is_fitted_once_and_stored_with_the_vae(checkpoint, tmp_path, fits, written):
    path = written(checkpoint, tmp_path / "written")
    assert len(fits) == 1
    read = load(path, Variant.IMAGE, FLOAT32)
    stored = read.preview_weights
    assert len(fits) == 1 and stored.dtype == np.float32
    # convert-vae fits under the launcher's bfloat16.
    assert np.abs(stored - fit_preview(read.vae)).max() < (1e-6 if written is converted else 4e-3)
    again = load(converted(path, tmp_path / "again"), Variant.IMAGE, FLOAT32).preview_weights
    assert len(fits) == 1 and np.array_equal(again, stored)
    load(checkpoint, Variant.IMAGE, BFLOAT16).preview_weights  # noqa: B018
    assert len(fits) == 2


@pytest.mark.parametrize("written", [converted, with_vae_of_its_own])
def test_another_vae_has_a_map_of_its_own(checkpoint, tmp_path, fits, written):
    path = written(checkpoint, tmp_path / "written")
    before = load(path, Variant.IMAGE, FLOAT32).preview_weights
    tensor = find_checkpoint(path, Variant.IMAGE).vae().tensors["decoder.head.2.bias"]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(np.full(tensor.shape, 0.25, "<f4").tobytes())
    changed = load(path, Variant.IMAGE, FLOAT32)
    assert np.array_equal(changed.preview_weights, fit_preview(changed.vae)) and len(fits) == 2
    assert np.abs(changed.preview_weights - before).max() > 0.1


def test_what_is_no_map_is_left_out_of_account(checkpoint):
    vae = read_vae(checkpoint / "Wan2.2_VAE.pth").tensors
    text = to_text(np.ones((49, 3), np.float32), vae)
    assert np.array_equal(from_text(text, vae), np.ones((49, 3)))
    values = json.loads(text)
    wrong = [{"factors": [[1.0]]}, {"factors": "x"}, {"factors": [[float("nan")] * 3] * 49}, {"vae": 3}]
    for spoilt in (None, 7, "", "{", "[]", "3", "[" * 100_000, *(json.dumps(values | each) for each in wrong)):
        assert from_text(spoilt, vae) is None, spoilt


@pytest.mark.parametrize("notes", [{"a": 1}, {"latent_rgb_factors": {"x": 1}}, [], 3, None])
def test_a_file_with_whatever_notes_has_no_map(checkpoint, tmp_path, fits, notes):
    path = with_vae_of_its_own(checkpoint, tmp_path / "written") / "Wan2.2_VAE.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]) | {"__metadata__": notes}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    assert load(path.parent, Variant.IMAGE, FLOAT32).preview_weights.shape == (49, 3) and len(fits) == 2


def test_a_vae_that_makes_no_pixels_is_one_line():
    vae = Linear()
    vae.weights[0] = np.nan
    with pytest.raises(LanceError, match="decodes noise to NaN or infinite values: fetch the checkpoint again"):
        fit_preview(vae)
