"""The reference's own preprocessing: what upstream was given, and not what a broken lance_mlx makes."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.sidedata.sidedata import Type
from PIL import Image

import lance_mlx.media.preprocess
from lance_mlx.media import read as media_in
from lance_mlx.media import video
from parity.bundle.reading import read_bundle
from parity.comparison.check import check_bundle
from parity.comparison.exact import check_preprocessed
from parity.comparison.verdict import AGREE, DIVERGE
from parity.lance.components.visuals import IMAGENET
from parity.lance.derived_request import DerivedRequest
from parity.lance.hypotheses.resizing import Way, bucket, resized
from parity.lance.names import parse
from parity.lance.ports import ReferencePort
from parity.lance.record import record
from parity.lance.record_options import Options, build_request
from parity.lance.replay_mlx import preprocess_mlx
from parity.lance.replay_torch import preprocess_reference
from reference.errors import ReferenceError
from reference.preprocess import _displayed, aspect_box, frames, preprocess
from reference.request import Medium, Request

ORACLES = Path(__file__).parents[2] / "oracles"
GARDEN = ORACLES / "media" / "garden.png"


def edit_of(path, vae=64, vit=56, kind="image"):
    spec = {
        "interleave_array": ["a hat", str(path)],
        "element_dtype_array": ["text", kind],
        "istarget_in_interleave": [0, 0],
    }
    return Request.from_dict({"task": f"{kind}_edit", "spec": spec, "vae_resolution": vae, "vit_resolution": vit})


def test_visuals_are_prepared_as_upstream_did(oracle):
    bundle = read_bundle(oracle)
    computed = ReferencePort(bundle).preprocessed(bundle.path.parent)
    if not bundle.inputs.keys() & {"vae_pixels0", "vit_patches0"}:
        assert computed is None
        return
    assert computed and list(check_preprocessed(computed, bundle.inputs)) == []


def varied(folder):
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (90, 130, 4), np.uint8), "RGBA")
    images = {mode: colours.convert(mode) for mode in ("RGBA", "RGB", "LA", "L", "CMYK", "1")}
    images["P"] = colours.convert("RGB").quantize(16)
    images["16"] = Image.fromarray(rng.integers(0, 2**16, (90, 130), np.uint16))
    for name, image in images.items():
        image.save(folder / f"{name}.{'tif' if name == 'CMYK' else 'png'}")
    images["P"].save(folder / "key.png", transparency=3)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        images["RGB"].save(folder / f"turned{turn}.png", exif=exif)
    return sorted(folder.iterdir())


def test_both_sides_make_the_same_of_every_kind_of_image(tmp_path):
    paths = varied(tmp_path)
    assert len(paths) == 17
    for path in paths:
        ours = media_in.read_visual(path, "image", as_upstream=True).pixels
        (visual,) = preprocess(edit_of(path), Path())
        assert np.array_equal(np.asarray(next(frames(path, Medium.IMAGE)))[None], ours), path.name
        assert np.array_equal(visual.vae_pixels, lance_mlx.media.preprocess.vae_pixels(ours, 64).transpose(3, 0, 1, 2))
        patches, grid = lance_mlx.media.preprocess.vit_patches(ours, 56)
        assert np.array_equal(visual.vit_patches, patches) and visual.vit_grid == grid


def test_what_is_compared_is_read_as_upstream_reads(tmp_path):
    # By itself lance_mlx turns the one upright and puts the other on white.
    varied(tmp_path)
    for path in (tmp_path / "turned6.png", tmp_path / "LA.png"):
        request = build_request("image_edit", Options("blue", images=(path,), vae_resolution=64, vit_resolution=56))
        arrays = preprocess_mlx(request, "kv_cache", Path())
        (visual,) = preprocess(edit_of(path), Path())
        assert np.array_equal(arrays["vae_pixels0"], visual.vae_pixels)
        assert np.array_equal(arrays["vit_patches0"], visual.vit_patches)


def test_a_path_that_no_disk_takes_is_a_file_that_is_not_at_hand(tmp_path):
    bundle = read_bundle(ORACLES / "image_edit-fp32-nokv")
    path = "a" * 5000
    request = build_request("image_edit", Options("blue", images=(path,), vae_resolution=64, vit_resolution=56))
    assert preprocess_mlx(request, "kv_cache", tmp_path) is None
    assert preprocess_reference(Request.from_dict(request), tmp_path) is None
    asked = DerivedRequest(replace(bundle, manifest=bundle.manifest | {"request": request}))
    assert asked.media is None
    site = SimpleNamespace(oracle=SimpleNamespace(run=asked, bundle=bundle), tap=parse("inputs/vit_patches0"))
    assert resized(Way(bucket))(site, None) is None


def test_both_sides_cut_pictures_of_any_size_alike():
    rng = np.random.default_rng(1)
    for width, height in rng.integers(16, 3000, (300, 2)).tolist():
        for aspect in (976 / 416, 848 / 480, 4 / 3, 1.0, 0.75, 9 / 16):
            left, top, right, bottom = aspect_box(width, height, aspect)
            assert (top, left, bottom - top, right - left) == lance_mlx.media.preprocess.crop_box(height, width, aspect)


def test_lance_mlx_is_not_compared_with_itself(tmp_path, monkeypatch, alone):
    options = Options(question="a", images=(GARDEN,), vit_resolution=56, max_new_tokens=2)
    bundle = record(tmp_path / "x", ORACLES / "checkpoint-a", build_request("x2t_image", options), dtype="float32")
    with alone():
        assert check_bundle(bundle, "reference").verdict == check_bundle(bundle, "mlx").verdict == AGREE
    monkeypatch.setattr(lance_mlx.media.preprocess, "_VIT_STD", IMAGENET[1])
    found = check_bundle(bundle, "mlx")
    assert found.verdict == DIVERGE and found.first_divergence["tap"] == "inputs/vit_patches0"
    assert check_bundle(bundle, "reference").verdict == AGREE


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("no.png", "image", "not found"),
        ("text.png", "image", "not readable as image"),
        ("text.png", "video", "as video"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, kind, message):
    (tmp_path / "text.png").write_text("nothing")
    with pytest.raises(ReferenceError, match=message) as caught:
        preprocess(edit_of(tmp_path / name, kind=kind), Path())
    assert "\n" not in str(caught.value)


def test_a_resolution_that_leaves_nothing_is_refused():
    with pytest.raises(ReferenceError, match="16x16 pixels leave no multiple of 28"):
        preprocess(edit_of(GARDEN, vit=16), Path())


def test_both_sides_turn_and_mirror_frames_alike():
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    for a, b, c, d in [(x, 0, 0, y) for x in (-1, 1) for y in (-1, 1)] + [
        (0, x, y, 0) for x in (-1, 1) for y in (-1, 1)
    ]:
        matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 14], np.int32) * (1 << 16)
        frame = SimpleNamespace(side_data={Type.DISPLAYMATRIX: matrix.tobytes()})
        expected = video._turn(pixels, video._display_axes(frame))
        assert np.array_equal(_displayed(pixels, frame), expected), (a, b, c, d)


def test_both_sides_read_frames_with_exif(tmp_path):
    shown = set()
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = turn, "a maker"
        Image.open(GARDEN).convert("RGB").crop((0, 0, 48, 32)).save(path := tmp_path / f"{turn}.jpg", exif=exif)
        with av.open(str(path)) as container:
            (frame,) = container.decode(video=0)
        (expected,) = media_in.read_visual(path, "video").pixels
        assert np.array_equal(_displayed(frame.to_ndarray(format="rgb24"), frame), expected)
        shown.add(expected.tobytes())
    assert len(shown) == 8
