"""Rows in pieces are what they are together, and hold less on the way."""

import mlx.core as mx
import numpy as np
import pytest

from lance_mlx.backend import pieces
from lance_mlx.model.layers import MLP, Linear


@pytest.fixture(params=[mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


def whole_and_in_pieces(monkeypatch, function, x):
    results = []
    for values in (1 << 40, 1 << 14):
        monkeypatch.setattr(pieces, "PIECE_VALUES", values)
        monkeypatch.setattr(pieces, "GPU_PIECE_VALUES", values)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        result = function(x)
        mx.eval(result)
        results.append((np.array(result.astype(mx.float32)), mx.get_peak_memory() - before, result.dtype))
    return results


@pytest.mark.parametrize("rows", [1, 63, 64, 1000])
@pytest.mark.parametrize("make", [lambda: MLP(32, 256, bias=False), lambda: Linear(32, 256)], ids=["MLP", "Linear"])
def test_pieces_are_the_whole(monkeypatch, make, rows, dtype):
    mx.random.seed(rows)
    module = make()
    module.set_dtype(dtype)
    x = mx.random.normal((rows, 32)).astype(dtype)
    (whole, much, kind), (parts, less, same) = whole_and_in_pieces(monkeypatch, module, x)
    assert kind == same == dtype and whole.shape == parts.shape
    fine = 1e-6 if dtype == mx.float32 else 2.0**-7
    np.testing.assert_allclose(parts, whole, rtol=fine, atol=fine * np.abs(whole).max())
    assert rows < 1000 or isinstance(module, Linear) or less < 0.5 * much
