"""The streaming VAE: causal, the same at any chunking, and bounded in memory."""

from collections.abc import Callable
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map

from lance_mlx.backend.numerics import FLOAT32
from lance_mlx.model.vae import VAE, num_decoded_frames
from lance_mlx.model.vae_constants import LATENT_MEAN, LATENT_STD
from lance_mlx.model.vae_decoder import DecoderShape, UpBlockShape
from lance_mlx.model.vae_encoder import DownBlockShape, EncoderShape
from lance_mlx.model.vae_layers import StreamState

WIDTH = 4


@pytest.fixture(scope="module")
def vae() -> VAE:
    """Wan 2.2's VAE at a fraction of its width, with seeded random weights."""
    down = [(1, 1, 2, True, False), (1, 2, 2, True, True), (2, 4, 2, True, True), (4, 4, 2, False, False)]
    up = [(4, 4, 3, True, True), (4, 4, 3, True, True), (4, 2, 3, True, False), (2, 1, 3, False, False)]
    encoder = EncoderShape(WIDTH, tuple(DownBlockShape(n * WIDTH, m * WIDTH, *rest) for n, m, *rest in down))
    decoder = DecoderShape(4 * WIDTH, tuple(UpBlockShape(n * WIDTH, m * WIDTH, *rest) for n, m, *rest in up))
    model = VAE(decoder, encoder, FLOAT32)
    mx.random.seed(0)
    model.update(tree_map(random_values, model.parameters()))
    mx.eval(model.parameters())
    return model


def random_values(parameter: mx.array) -> mx.array:
    """Values that keep activations near unit size, and few of the pixels beyond their bounds."""
    values = mx.random.normal(parameter.shape)
    if parameter.ndim == 1:
        return 0.3 + 0.1 * values
    return values * (parameter.size / len(parameter)) ** -0.5


def decode(vae: VAE, latents: mx.array) -> list[np.ndarray]:
    return [np.array(chunk) for chunk in vae.decode(latents)]


def encode(vae: VAE, pixels: np.ndarray) -> list[np.ndarray]:
    """Mean and log-variance of each latent frame, [1, h, w, 96]."""
    return [np.concatenate([np.array(part) for part in frame], axis=-1) for frame in vae.encode_frames(pixels)]


def random_pixels(frames: int, rows: int, columns: int) -> np.ndarray:
    rng = np.random.default_rng(frames)
    return rng.uniform(-1, 1, (frames, 16 * rows, 16 * columns, 3)).astype(np.float32)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def latent_frame_of(frame: int) -> int:
    """The latent frame that a frame of pixels is encoded into."""
    return (frame + 3) // 4


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.data())
def test_a_later_latent_frame_never_changes_earlier_pixels(vae, frames, rows, columns, data):
    latents = mx.random.normal((frames, rows, columns, 48), key=mx.random.key(frames))
    changed = data.draw(st.integers(0, frames - 1))
    plain = decode(vae, latents)
    moved = decode(vae, latents + (mx.arange(frames) == changed)[:, None, None, None])
    for index, (before, after) in enumerate(zip(plain, moved, strict=True)):
        assert np.array_equal(before, after) == (index < changed)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 17), st.integers(1, 2), st.integers(1, 2), st.data())
def test_a_later_frame_never_changes_earlier_latents(vae, frames, rows, columns, data):
    pixels = random_pixels(frames, rows, columns)
    changed = data.draw(st.integers(0, frames - 1))
    moved = pixels.copy()
    moved[changed] = -moved[changed]
    plain = encode(vae, pixels)
    assert len(plain) == latent_frame_of(frames - 4) + 1 == (frames - 1) // 4 + 1
    for index, (before, after) in enumerate(zip(plain, encode(vae, moved), strict=True)):
        assert np.array_equal(before, after) == (index < latent_frame_of(changed))
    # So a clip that is cut short has the latents of the whole one's start.
    short = encode(vae, pixels[: changed + 1])
    assert all(np.array_equal(before, after) for before, after in zip(short, plain, strict=False))


@settings(deadline=None, max_examples=10)
@given(st.sets(st.integers(1, 5)), st.integers(1, 2), st.integers(1, 2))
def test_encoding_is_the_same_at_any_chunking(vae, cuts, rows, columns):
    pixels = random_pixels(4 * 5 + 1, rows, columns)
    packed = pixels.reshape(len(pixels), 8 * rows, 2, 8 * columns, 2, 3).transpose(0, 1, 3, 5, 4, 2)
    packed = mx.array(packed.reshape(len(pixels), 8 * rows, 8 * columns, 12))
    state, moments = StreamState(), []
    for start, stop in pairwise([0, *(4 * cut - 3 for cut in sorted({1, *cuts})), len(pixels)]):
        moments.append(vae.conv1(vae.encoder(packed[start:stop], state), state))
    mean, logvar = np.split(np.array(mx.concatenate(moments)), 2, axis=-1)
    mean = (mean - np.float32(LATENT_MEAN)) / np.float32(LATENT_STD)
    whole = vae.encode(pixels)
    assert relative_error(mean, np.array(whole.mean)) < 1e-5
    assert relative_error(logvar, np.array(whole.logvar)) < 1e-5
    frames = encode(vae, pixels)
    assert np.array_equal(np.concatenate(frames), np.concatenate([whole.mean, whole.logvar], axis=-1))


@settings(deadline=None, max_examples=10)
@given(st.sets(st.integers(1, 4)), st.integers(1, 2), st.integers(1, 2))
def test_decoding_is_the_same_at_any_chunking(vae, cuts, rows, columns):
    latents = mx.random.normal((5, rows, columns, 48), key=mx.random.key(rows))
    raw = latents * mx.array(LATENT_STD) + mx.array(LATENT_MEAN)
    state, chunks = StreamState(), []
    # The first latent frame is up-sampled differently, so it comes alone.
    for start, stop in pairwise([0, *sorted({1, *cuts}), 5]):
        chunks.append(vae.decoder(vae.conv2(raw[start:stop], state), state))
    packed = np.array(mx.concatenate(chunks))
    pixels = packed.reshape(len(packed), 8 * rows, 8 * columns, 3, 2, 2).transpose(0, 1, 5, 2, 4, 3)
    pixels = np.clip(pixels.reshape(len(packed), 16 * rows, 16 * columns, 3), -1, 1)
    assert relative_error(pixels, np.concatenate(decode(vae, latents))) < 1e-5


def test_the_first_latent_frame_gives_one_frame_and_every_other_four(vae):
    chunks = decode(vae, mx.zeros((4, 2, 3, 48)))
    assert [chunk.shape for chunk in chunks] == [(1, 32, 48, 3)] + [(4, 32, 48, 3)] * 3
    assert sum(map(len, chunks)) == num_decoded_frames(4) == 13
    assert all(np.abs(chunk).max() <= 1 for chunk in chunks)


class Clip:
    """Pixels of a video that are made when they are sliced, as those of a file would be read."""

    def __init__(self, frames: int, height: int, width: int) -> None:
        self.frames, self.size = frames, (height, width)

    def __len__(self) -> int:
        return self.frames

    def __getitem__(self, frames: slice) -> np.ndarray:
        wanted = range(self.frames)[frames]
        return np.random.default_rng(wanted.start).uniform(-1, 1, (len(wanted), *self.size, 3)).astype(np.float32)


def test_memory_does_not_grow_with_the_number_of_frames(vae):
    height, width = 64, 96

    def encode_clip(frames: int) -> None:
        for statistics in vae.encode_frames(Clip(frames, height, width)):
            del statistics

    def decode_clip(frames: int) -> None:
        for pixels in vae.decode(mx.zeros(((frames + 3) // 4, height // 16, width // 16, 48))):
            del pixels

    def peak(run: Callable[[int], None], frames: int) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        run(frames)
        return mx.get_peak_memory()

    for run in (encode_clip, decode_clip):
        assert peak(run, 121) <= 1.2 * peak(run, 13), run.__name__
