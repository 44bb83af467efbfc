"""Preprocessing: sizes, crops and patches by themselves, and the tensors of upstream's own runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lance_mlx.errors import LanceError
from lance_mlx.media.preprocess import RESOLUTIONS, bucket_size, patchify, vae_pixels, vit_patches
from lance_mlx.media.read import read_visual

ROOT = Path(__file__).parents[2]
# More bundles of the same kind may lie beside the repository.
ORACLES = [folder for folder in (ROOT / "oracles", ROOT.parent / "shared" / "oracles") if folder.is_dir()]
ASPECT_RATIOS = ((21, 9), (16, 9), (4, 3), (1, 1), (3, 4), (9, 16))
VIT_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
VIT_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def with_media(pattern: str) -> list:
    """Paths of manifests and layouts whose request names a file that is there; if none, one case that is skipped."""
    cases = []
    for folder in ORACLES:
        for path in sorted(folder.glob(pattern)):
            spec = json.loads(path.read_text())["request"].get("spec")
            if isinstance(spec, dict) and all((folder / name).is_file() for name, _ in visuals(spec)):
                cases.append(pytest.param(path, folder, id=path.parent.name if path.stem == "manifest" else path.stem))
    return cases or [pytest.param(None, None, marks=pytest.mark.skip("no oracle with media is here"))]


def visuals(spec: dict) -> list[tuple[str, str]]:
    pairs = zip(spec["interleave_array"], spec["element_dtype_array"], strict=True)
    return [(name, kind) for name, kind in pairs if kind != "text"]


@pytest.mark.parametrize(("path", "folder"), with_media("*/manifest.json"))
def test_the_tensors_of_the_oracles_bit_for_bit(path, folder):
    safetensors = pytest.importorskip("safetensors.numpy")
    request = json.loads(path.read_text())["request"]
    inputs = safetensors.load_file(path.with_name("inputs.safetensors"))
    compared = 0
    for index, (name, kind) in enumerate(visuals(request["spec"])):
        frames = read_visual(folder / name, kind).pixels
        if "vae_resolution" in request:
            expected = inputs[f"vae_pixels{index}"].transpose(1, 2, 3, 0)
            # Image to video: the picture fills the first four frames of the target, noise the others.
            given = expected[:4] if request["task"] == "i2v" else expected
            got = vae_pixels(frames, request["vae_resolution"])
            assert got.dtype == np.float32 and got.shape[1:] == given.shape[1:]
            assert np.array_equal(np.broadcast_to(got, given.shape), given)
            compared += 1
        if f"vit_patches{index}" in inputs:
            patches, grid = vit_patches(frames, request["vit_resolution"])
            assert patches.dtype == np.float32 and np.array_equal(patches, inputs[f"vit_patches{index}"])
            assert grid == tuple(inputs["vit_video_grid_thw"][index])
            compared += 1
    assert compared


@pytest.mark.parametrize(("path", "folder"), with_media("layouts/*.json"))
def test_the_sizes_of_the_layouts(path, folder):
    request, arrays = json.loads(path.read_text())["request"], np.load(path.with_suffix(".npz"))
    vae_resolution, vit_resolution = RESOLUTIONS[request["resolution"]]
    for index, (name, kind) in enumerate(visuals(request["spec"])):
        frames = read_visual(folder / name, kind).pixels
        if "vae_pixel_shapes" in arrays:
            _, num_frames, *size = arrays["vae_pixel_shapes"][index]
            pixels = vae_pixels(frames, vae_resolution)
            assert list(pixels.shape[1:3]) == size
            assert len(pixels) == (1 if request["task"] == "i2v" else num_frames)
        if "vit_patch_shapes" in arrays:
            patches, grid = vit_patches(frames, vit_resolution)
            assert patches.shape == tuple(arrays["vit_patch_shapes"][index])
            assert grid == tuple(arrays["vit_video_grid_thw"][index])


@pytest.mark.parametrize(
    ("size", "resolution", "divisor", "expected"),
    [
        ((700, 1024), 768, 16, (672, 896)),
        ((700, 1024), 640, 16, (560, 752)),
        ((700, 1024), 672, 28, (560, 756)),
        ((180, 320), 640, 16, (480, 848)),
        ((180, 320), 616, 28, (448, 812)),
        ((150, 200), 64, 16, (48, 64)),
        ((80, 96), 56, 28, (28, 56)),
        ((160, 160), 56, 28, (56, 56)),
        ((1920, 1080), 768, 16, (1024, 576)),
    ],
)
def test_sizes_that_upstream_gives(size, resolution, divisor, expected):
    assert bucket_size(*size, resolution, divisor) == expected


@given(st.integers(16, 5000), st.integers(16, 5000), st.integers(56, 1024), st.sampled_from([16, 28]))
def test_a_bucket_is_whole_near_its_area_and_nearest_in_aspect(height, width, resolution, divisor):
    rows, columns = bucket_size(height, width, resolution, divisor)
    assert rows % divisor == 0 and columns % divisor == 0 and rows > 0 and columns > 0
    rows, columns = bucket_size(height, width, resolution, 16)
    assert abs(rows * columns - resolution**2) <= 16 * (rows + columns)
    others = [bucket_size(ratio[1] * 300, ratio[0] * 300, resolution, 16) for ratio in ASPECT_RATIOS]
    away = [abs(other[1] / other[0] - width / height) for other in others]
    assert abs(columns / rows - width / height) == min(away)


@pytest.mark.parametrize("resolution", [-1, 0, 15, 20])
def test_a_resolution_without_room(resolution):
    with pytest.raises(LanceError, match=f"resolution {resolution} "):
        bucket_size(64, 64, resolution, 28)


def test_a_picture_of_the_buckets_size_is_only_normalised():
    frames = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    pixels = vae_pixels(frames, 64)
    assert pixels.shape == (3, 48, 64, 3) and pixels.dtype == np.float32
    assert np.abs(pixels - (frames / 127.5 - 1)).max() < 1e-6


def test_all_levels_lie_in_minus_one_to_one():
    frames = np.arange(256, dtype=np.uint8).repeat(12).reshape(1, 32, 32, 3)
    pixels = vae_pixels(frames, 32)
    assert pixels.min() == -1 and pixels.max() == 1


@pytest.mark.parametrize("upright", [False, True])
def test_the_middle_is_kept_and_what_is_cropped_leaves_no_trace(upright):
    frames = np.zeros((1, 90, 130, 3), np.uint8)
    frames[:, :, 5:125] = 255  # the 4:3 middle
    if upright:
        frames = np.zeros((1, 300, 90, 3), np.uint8)
        frames[:, 70:230] = 255  # the 9:16 middle
    pixels = vae_pixels(frames, 64)
    assert (pixels == 1).all()


def test_shrinking_averages():
    frames = np.zeros((1, 640, 640, 3), np.uint8)
    frames[:, ::2] = 255
    pixels = vae_pixels(frames, 64)
    assert pixels.shape == (1, 64, 64, 3) and np.abs(pixels).max() < 0.1


@pytest.mark.parametrize(("num_frames", "t"), [(1, 1), (2, 1), (5, 3), (13, 7)])
def test_an_odd_number_of_frames_repeats_the_last(num_frames, t):
    frames = np.random.default_rng(0).integers(0, 256, (num_frames, 56, 56, 3), dtype=np.uint8)
    patches, grid = vit_patches(frames, 56)
    assert grid == (t, 4, 4) and patches.shape == (t * 16, 1176) and patches.dtype == np.float32
    if num_frames % 2:
        assert np.array_equal(patches, vit_patches(np.concatenate([frames, frames[-1:]]), 56)[0])
        last = patches[-16:].reshape(16, 3, 2, 14, 14)
        assert np.array_equal(last[:, :, 0], last[:, :, 1])


def test_the_vit_sees_clips_mean_and_deviation():
    patches, _ = vit_patches(np.full((1, 56, 56, 3), (255, 0, 51), np.uint8), 56)
    expected = (np.array([1, 0, 0.2], np.float32) - VIT_MEAN) / VIT_STD
    assert np.abs(patches.reshape(-1, 3, 392) - expected[None, :, None]).max() < 1e-6


@given(hnp.array_shapes(min_dims=3, max_dims=3, max_side=3), st.data())
@settings(max_examples=30)
def test_patches_are_the_pixels_in_another_order(units, data):
    t, rows, columns = units[0], units[1] * 28, units[2] * 28
    pixels = np.arange(t * 2 * rows * columns * 3, dtype=np.float32).reshape(t * 2, rows, columns, 3)
    patches, grid = patchify(pixels)
    assert grid == (t, rows // 14, columns // 14) and patches.shape == (np.prod(grid), 1176)
    assert np.array_equal(np.sort(patches.ravel()), pixels.ravel())

    frame = data.draw(st.integers(0, 2 * t - 1))
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    channel = data.draw(st.integers(0, 2))
    # Tokens of 28 x 28 pixels in reading order, in each the four patches in reading order.
    token = (frame // 2 * units[1] + row // 28) * units[2] + column // 28
    patch = token * 4 + row % 28 // 14 * 2 + column % 28 // 14
    within = ((channel * 2 + frame % 2) * 14 + row % 14) * 14 + column % 14
    assert patches[patch, within] == pixels[frame, row, column, channel]


def test_the_named_resolutions():
    for vae_resolution, vit_resolution in RESOLUTIONS.values():
        for width, height in ASPECT_RATIOS:
            assert min(bucket_size(height * 100, width * 100, vae_resolution, 16)) > 0
            assert min(bucket_size(height * 100, width * 100, vit_resolution, 28)) > 0
