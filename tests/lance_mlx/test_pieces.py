"""Rows in pieces are what they are together, and hold less on the way."""

import mlx.core as mx
import numpy as np
import pytest

from lance_mlx.backend import cpu_attention, pieces
from lance_mlx.model.layers import Linear
from lance_mlx.model.mot import ArmInput, ExpertRows
from lance_mlx.model.rope import rotary_table


@pytest.fixture(params=[mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


def whole_and_in_pieces(monkeypatch, function, x):
    monkeypatch.setattr(cpu_attention, "SCORES", 1)
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
def test_products_in_pieces_are_the_whole(monkeypatch, rows, dtype):
    mx.random.seed(rows)
    linear = Linear(32, 256)
    linear.set_dtype(dtype)
    x = mx.random.normal((rows, 32)).astype(dtype)
    (whole, _, kind), (parts, _, same) = whole_and_in_pieces(monkeypatch, linear, x)
    assert kind == same == dtype
    fine = 1e-6 if dtype == mx.float32 else 2.0**-7
    np.testing.assert_allclose(parts, whole, rtol=fine, atol=fine * np.abs(whole).max())


@pytest.mark.parametrize("rows", [7, 2000])
def test_a_pass_in_pieces_is_the_whole_and_holds_less(monkeypatch, pipeline, rows):
    model = pipeline.model.language_model.model
    config = pipeline.model.config
    table = rotary_table(np.arange(3 * (rows + 2), dtype=np.int32).reshape(3, -1), config, pipeline.model.numerics)
    und, gen = mx.random.normal((2, config.hidden_size)), mx.random.normal((rows, config.hidden_size))

    def function(x):
        hidden, _ = model(ExpertRows(und, x), [ArmInput(table, ())], causal=False, qk_float32=False, keep=False)
        return hidden.gen

    (whole, much, _), (parts, less, _) = whole_and_in_pieces(monkeypatch, function, gen)
    assert np.linalg.norm(parts - whole) < 1e-5 * np.linalg.norm(whole)
    assert rows < 100 or less < 0.75 * much
