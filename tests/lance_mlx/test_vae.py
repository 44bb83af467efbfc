"""The streaming decoder: causal, and bounded in memory."""

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_mlx.model.vae import num_decoded_frames


def decode(pipeline, latents: mx.array) -> list[np.ndarray]:
    return [np.array(chunk) for chunk in pipeline.vae.decode(latents)]


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.data())
def test_a_later_latent_frame_never_changes_earlier_pixels(pipeline, frames, rows, columns, data):
    latents = mx.random.normal((frames, rows, columns, 48), key=mx.random.key(frames))
    changed = data.draw(st.integers(0, frames - 1))
    plain = decode(pipeline, latents)
    moved = decode(pipeline, latents + (mx.arange(frames) == changed)[:, None, None, None])
    for index, (before, after) in enumerate(zip(plain, moved, strict=True)):
        assert np.array_equal(before, after) == (index < changed)


def test_the_first_latent_frame_gives_one_frame_and_every_other_four(pipeline):
    chunks = decode(pipeline, mx.zeros((4, 2, 3, 48)))
    assert [chunk.shape for chunk in chunks] == [(1, 32, 48, 3)] + [(4, 32, 48, 3)] * 3
    assert sum(map(len, chunks)) == num_decoded_frames(4) == 13
    assert all(np.abs(chunk).max() <= 1 for chunk in chunks)


def test_memory_does_not_grow_with_the_number_of_frames(pipeline):
    def peak(frames: int) -> int:
        latents = mx.random.normal((frames, 6, 6, 48), key=mx.random.key(0))
        mx.eval(latents)
        mx.clear_cache()
        mx.reset_peak_memory()
        for chunk in pipeline.vae.decode(latents):
            del chunk
        return mx.get_peak_memory()

    assert peak(16) <= 1.05 * peak(4)
