"""Convolutions of more values than MLX addresses: in rows where that helps, else refused in a line."""

import mlx.core as mx
import numpy as np
import pytest

from lance_mlx import LanceError
from lance_mlx.model import vae_layers
from lance_mlx.model.vae_layers import convolve

CASES = [
    # kernel, padding, stride: those of the VAE.
    ((3, 3, 3), ((2, 0), (1, 1), (1, 1)), (1, 1, 1)),
    ((1, 3, 3), ((0, 0), (1, 1), (1, 1)), (1, 1, 1)),
    ((1, 3, 3), ((0, 0), (0, 1), (0, 1)), (1, 2, 2)),
    ((3, 1, 1), ((0, 0), (0, 0), (0, 0)), (2, 1, 1)),
    ((1, 1, 1), ((0, 0), (0, 0), (0, 0)), (1, 1, 1)),
]


def given(kernel: tuple) -> tuple[mx.array, mx.array, mx.array]:
    shapes = (3, 10, 6, 4), (5, *kernel, 4), (5,)
    return tuple(mx.random.normal(shape, key=mx.random.key(index)) for index, shape in enumerate(shapes))


@pytest.fixture
def pieces(monkeypatch) -> list[tuple]:
    """Shapes of the input of every convolution that MLX is given."""
    seen, original = [], mx.conv_general
    monkeypatch.setattr(mx, "conv_general", lambda x, *rest, **by: seen.append(x.shape) or original(x, *rest, **by))
    return seen


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_at_a_time_give_the_whole(case, rows, pieces, monkeypatch):
    kernel, *rest = case
    arrays = given(kernel)
    expected = convolve(*arrays, *rest)
    assert len(pieces) == 1
    frames, height, columns, _ = expected.shape
    limit = rows * frames * columns * int(np.prod(kernel)) * 4
    monkeypatch.setattr(vae_layers, "MAX_VALUES", max(limit, arrays[0].size, expected.size))
    monkeypatch.setattr(vae_layers, "_most_at_once", lambda dtype: limit)
    pieces.clear()
    found = convolve(*arrays, *rest)
    assert len(pieces) == -(-height // rows)
    assert np.allclose(found, expected, atol=1e-5)


def test_more_than_mlx_addresses_goes_in_rows_and_what_no_rows_help_is_refused(pieces, monkeypatch):
    kernel, *rest = CASES[0]
    arrays = given(kernel)
    # 3 frames of 10 rows and 6 columns, of which 108 values meet each place of a row.
    monkeypatch.setattr(vae_layers, "MAX_VALUES", 3 * 6 * 108)
    assert convolve(*arrays, *rest).shape == (3, 10, 6, 5)
    assert len(pieces) == 10
    pieces.clear()
    monkeypatch.setattr(vae_layers, "MAX_VALUES", 3 * 6 * 108 - 1)
    with pytest.raises(LanceError, match="a convolution of the VAE holds 1,944 values, .* choose a smaller size"):
        convolve(*arrays, *rest)
    # The output alone.
    monkeypatch.setattr(vae_layers, "MAX_VALUES", 3 * 10 * 6 * 5 - 1)
    with pytest.raises(LanceError, match="holds 900 values"):
        convolve(*given((1, 1, 1)), *CASES[4][1:])
    assert pieces == []


def test_on_metal_a_quarter_of_its_working_set_is_used(pieces, monkeypatch):
    arrays, rest = given((1, 3, 3)), CASES[1][1:]
    expected = convolve(*arrays, *rest)
    monkeypatch.setattr(vae_layers, "runs_on_cpu", lambda: False)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 16 * 5 * 3 * 6 * 36})
    pieces.clear()
    assert np.allclose(convolve(*arrays, *rest), expected, atol=1e-5)
    assert [shape[1] for shape in pieces] == [6, 6]
    # CUDA's has no such thing.
    monkeypatch.setattr(mx, "device_info", lambda: {"total_memory": 1})
    pieces.clear()
    convolve(*arrays, *rest)
    assert len(pieces) == 1
