"""The VAE in tiles: how near to the whole, when they start by themselves, and what an option and the metadata say."""

import json
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_mlx import FLOAT32, LanceError, Request, Task, Variant, load, loaded
from lance_mlx.backend.numerics import runs_on_cpu
from lance_mlx.checkpoint.layouts import find_checkpoint
from lance_mlx.cli.replay import options_of
from lance_mlx.estimate import tiling
from lance_mlx.estimate.estimate import OFFICIAL, coders_of, sizes_of
from lance_mlx.estimate.tiling import tile_chooser
from lance_mlx.model.vae_layers import StreamState
from lance_mlx.model.vae_tiles import OVERLAP, SMALLEST, spans
from lance_mlx.pipeline import load as load_pipeline

ROWS, COLUMNS = 2, 34
"""Of the smallest width that takes two tiles of 24 cells."""


@pytest.fixture(scope="module")
def vae(checkpoint):
    """The small checkpoint's."""
    return load_pipeline(checkpoint, Variant.VIDEO, FLOAT32, looks=True).vae


def in_tiles(vae, run, tile: int | None) -> list[np.ndarray]:
    vae.tile_for = lambda grid, encodes: tile
    try:
        return [np.array(array) for array in run()]
    finally:
        vae.tile_for = lambda grid, encodes: None


@given(st.integers(1, 256), st.integers(SMALLEST, 128))
def test_tiles_cover_a_side_and_their_weights_add_up_to_one(size, tile):
    found = spans(size, tile)
    assert len(found) == 1 if size <= tile else len(found) > 1
    total = np.zeros(8 * size)
    for span in found:
        assert 0 <= span.start < span.stop <= size and span.stop - span.start <= tile
        total[8 * span.start : 8 * span.stop] += span.weights(8)
    assert total == pytest.approx(np.ones(8 * size))
    for before, after in pairwise(found):
        assert before.stop - after.start >= OVERLAP - 1
        # Linear, over 4 cells of 8 steps, and zero where the cut is near.
        falls = np.diff(before.weights(8))
        assert len(falls[falls < 0]) in (32, 33) and falls.min() == pytest.approx(-1 / 32)
        assert before.weights(8)[-8 * (OVERLAP // 2 - 3) :].max() == 0


@pytest.mark.parametrize("tile", [24, 32])
def test_decoding_in_tiles_comes_within_a_thousandth_of_the_whole(vae, tile):
    latents = mx.random.normal((2, ROWS, COLUMNS, 48), key=mx.random.key(1))
    whole, tiled = (in_tiles(vae, lambda: vae.decode(latents), side) for side in (None, tile))
    assert [chunk.shape for chunk in tiled] == [chunk.shape for chunk in whole]
    errors = [np.abs(a - b).max() for a, b in zip(tiled, whole, strict=True)]
    assert 0 < max(errors) < 1e-3
    # A later latent frame changes nothing before it.
    first = in_tiles(vae, lambda: vae.decode(latents[:1]), tile)
    assert np.array_equal(first[0], tiled[0])


def test_encoding_in_tiles_comes_within_a_ten_thousandth_of_the_whole(vae):
    pixels = np.random.default_rng(0).uniform(-1, 1, (5, 16 * ROWS, 16 * COLUMNS, 3)).astype(np.float32)
    whole, tiled = (in_tiles(vae, lambda: vae.encode(pixels), side) for side in (None, 24))
    assert 0 < max(np.abs(a - b).max() for a, b in zip(tiled, whole, strict=True)) < 1e-4
    first = in_tiles(vae, lambda: vae.encode(pixels[:1]), 24)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first, tiled, strict=True))


def test_what_tiles_cut_sees_no_further_than_is_said(vae):
    def changed(run, x: mx.array, places: slice) -> bool:
        """Whether the first cell comes out otherwise when later columns are changed."""
        moved = mx.array(x)
        moved[:, :, places] += 1
        outputs = [np.array(run(each, StreamState())) for each in (x, moved)]
        own = outputs[0].shape[1] // 2
        return not np.array_equal(*(output[:, :, :own] for output in outputs))

    cells = mx.random.normal((1, 2, 16, vae.decoder.conv1.weight.shape[0]), key=mx.random.key(1))
    assert not changed(vae.decoder.widen, cells, np.s_[14:])
    assert changed(vae.decoder.widen, cells, np.s_[12:])
    packed = mx.random.normal((1, 16, 96, 12), key=mx.random.key(1))
    assert not changed(vae.encoder.narrow, packed, np.s_[8 * 10 :])
    assert changed(vae.encoder.narrow, packed, np.s_[8 * 8 :])


def test_a_tile_that_holds_the_frame_gives_the_same_bits(vae):
    latents = mx.random.normal((2, 2, 2, 48), key=mx.random.key(1))
    pixels = np.random.default_rng(0).uniform(-1, 1, (5, 32, 32, 3)).astype(np.float32)
    for run in (lambda: vae.decode(latents), lambda: vae.encode(pixels)):
        assert all(map(np.array_equal, in_tiles(vae, run, None), in_tiles(vae, run, 24)))


@pytest.mark.skipif(not runs_on_cpu(), reason="memory is estimated from what was measured on the CPU")
def test_tiles_take_as_much_less_memory_as_estimated(checkpoint, vae):
    grid, peaks = (2, 2, 60), []
    decoder, _ = coders_of(sizes_of(find_checkpoint(checkpoint, Variant.VIDEO), False), FLOAT32, True, on_cpu=True)
    latents = mx.random.normal((*grid, 48), key=mx.random.key(1))
    for tile in (None, 24):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        in_tiles(vae, lambda: vae.decode(latents), tile)
        peaks.append(mx.get_peak_memory() - before)
        assert decoder.memory(grid, tile) / 2 < peaks[-1] < 1.25 * decoder.memory(grid, tile)
    assert peaks[1] < 0.7 * peaks[0]


def test_tiles_start_where_the_whole_does_not_fit(monkeypatch):
    decoder, encoder = coders_of(OFFICIAL, FLOAT32, low_ram=True, on_cpu=False)
    grid = (13, 48, 48)
    for coder, encodes in ((decoder, False), (encoder, True)):

        def chosen(budget: int, encodes: bool = encodes) -> int | None:
            return tile_chooser(decoder, encoder, budget)(grid, encodes)

        whole = coder.held + coder.memory(grid)
        assert (chosen(whole), chosen(whole - 1), chosen(0)) == (None, 40, SMALLEST)
        assert chosen(coder.held + coder.memory(grid, 32)) == 32
        # One frame of the smallest tile's size is never cut.
        assert tile_chooser(decoder, encoder, 0)((13, 24, 24), encodes) is None
    monkeypatch.setattr(tiling, "MAX_VALUES", 3 * 10**8)
    assert tile_chooser(decoder, encoder, 10**12)(grid, False) == 32


def drawn(model, width: int = 16 * COLUMNS):
    return model.generate(Request(Task.T2I, "a bird", 16, width, num_steps=1))


@pytest.mark.parametrize("low_ram", [False, True], ids=["kept", "low_ram"])
def test_what_fits_is_the_same_bit_for_bit_and_what_does_not_is_told(checkpoint, monkeypatch, tmp_path, low_ram):
    plain = drawn(load(checkpoint, FLOAT32, low_ram=low_ram))
    never = drawn(load(checkpoint, FLOAT32, low_ram=low_ram, vae_tiling="none"))
    assert plain.frames.tobytes() == never.frames.tobytes()
    assert "vae_tiling" not in plain.metadata and "departures" not in plain.metadata
    asked = drawn(load(checkpoint, FLOAT32, low_ram=low_ram, vae_tiling=384))
    monkeypatch.setattr(loaded, "budget", lambda: 0)
    small = drawn(load(checkpoint, FLOAT32, low_ram=low_ram))
    assert small.frames.tobytes() == asked.frames.tobytes() != plain.frames.tobytes()
    assert np.abs(small.frames.astype(int) - plain.frames).max() <= 1
    assert small.metadata["departures"] == ["frames decoded in tiles of 384 pixels"]
    small.save(tmp_path / "bird.png")
    assert options_of(tmp_path / "bird.png")["vae_tiling"] == 384
    assert "vae_tiling" not in drawn(load(checkpoint, FLOAT32, vae_tiling=384), 32).metadata


def test_the_estimate_has_the_tiles_that_are_used(checkpoint, invoke, monkeypatch):
    from lance_mlx.cli import info

    given = ["info", "--task", "t2v", "--width", 1024, "--height", 1024, "--model", checkpoint]
    sizes = sizes_of(find_checkpoint(checkpoint, Variant.VIDEO), looks=False)
    decoder, _ = coders_of(sizes, FLOAT32, False, on_cpu=True)
    assert "the VAE in tiles" not in invoke(*given).stdout
    budget = decoder.held + decoder.memory((13, 64, 64), 40)
    monkeypatch.setattr(info, "budget", lambda: budget)
    assert "the VAE in tiles: 640 pixels" in invoke(*given, "--numerics", "float32").stdout
    found = json.loads(invoke(*given, "--numerics", "float32", "--json").stdout)["estimate"]
    assert found["vae_tiling"]["kept"] == 640 and found["stages"]["kept"]["decoding"] <= budget


@pytest.mark.parametrize("value", ["sometimes", "100", "400.5", "393", "-384"])
def test_another_tiling_is_refused(refused, checkpoint, value):
    with pytest.raises(LanceError, match=f"vae_tiling {value} must be auto, none, or the side of a tile"):
        load(checkpoint, vae_tiling=value)
    line = refused(
        "generate", "t2i", "--model", checkpoint, "--prompt", "x", "--vae-tiling", value, "--output", "x.png"
    )
    assert "a multiple of 16 from 384" in line
