"""What training needs of the model: derivatives of what the host computes, and samples that say what is wrong."""

import mlx.core as mx
import numpy as np
import pytest

from lance_mlx.backend import vectorized
from lance_mlx.errors import LanceError
from lance_mlx.model.layers import silu
from lance_mlx.requests.request import Request, Task
from lance_mlx.sequence.segments import Role
from lance_mlx.training.pack import CAPTION, Sample, drawing_sample


def drawn(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32))


def test_silu_has_the_same_derivative_however_it_is_computed(monkeypatch):
    x, weights = drawn(300, 300), drawn(300, 300)
    calls = []
    original = vectorized.silu
    monkeypatch.setattr(vectorized, "silu", lambda given: calls.append(1) or original(given))

    def loss(given):
        return (silu(given) * weights).sum()

    host = mx.grad(loss)(x)
    assert calls
    monkeypatch.setattr("lance_mlx.model.layers._VECTORIZED", 1 << 30)
    calls.clear()
    np.testing.assert_allclose(np.array(host), np.array(mx.grad(loss)(x)), rtol=2e-5, atol=2e-6)
    assert not calls


def test_a_sample_must_be_filled(tokenizer):
    request = Request(Task.T2I, "a cat", height=32, width=48)
    latents = mx.zeros((1, 2, 3, 48))
    sample = drawing_sample(request, tokenizer, 2, [latents])
    assert sample.noised == 6 and not sample.clean.any() and len(sample.labels) == 0
    dropped = drawing_sample(request, tokenizer, 2, [latents], dropped=CAPTION)
    assert len(dropped.sequence.ids) < len(sample.sequence.ids) and Role.TEXT not in dropped.sequence.roles
    with pytest.raises(LanceError, match="do not fill blocks"):
        Sample(sample.sequence, sample.positions, latents=(mx.zeros((1, 3, 2, 48)),))
    with pytest.raises(LanceError, match="cannot begin at token 0"):
        Sample(sample.sequence, sample.positions, latents=(latents,), answer=0)
