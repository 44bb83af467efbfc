"""Previews: the linear map that is fitted to the VAE, and what a step's latents are heading for."""

import mlx.core as mx
import numpy as np

from lance_mlx import Request, Task
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
