"""Further inputs of a pair, and what is said of those that it was not given."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

from parity import ParityError, localize_pair
from parity.comparison.verdict import AGREE, DIVERGE, INCONCLUSIVE
from parity.pairs import Pair, copy_weights
from parity.pairs.inputs import untried


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(8, 4)

    def forward(self, ids):
        return self.embed(ids)


class Port(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)

    def __call__(self, ids):
        return self.embed(mx.minimum(ids, 3) if ids.shape[1] > 5 else ids)


def made(*shape):
    return {"ids": np.arange(int(np.prod(shape))).reshape(shape) % 8}


def test_a_later_input_shows_what_the_first_does_not():
    pair = Pair(Torch().eval(), Port(), made(1, 4), also={"a batch": made(2, 4), "a long one": made(1, 8)})
    copy_weights(pair)
    found = localize_pair(pair, "small")
    assert (found.verdict, found.bundle) == (DIVERGE, "small, a long one")
    assert found.first.component == "embed"


def test_what_agrees_tells_what_was_run_and_what_was_not():
    pair = Pair(Torch().eval(), Port(), made(1, 4), also={"a batch": made(2, 4)})
    copy_weights(pair)
    found = localize_pair(pair, "small")
    assert (found.verdict, found.bundle) == (AGREE, "small")
    assert found.remark == "run with the inputs, a batch; not tried: one token alone, an odd number of tokens"


def test_windows_and_scaled_positions_are_asked_for_by_the_configuration():
    trusted = Torch()
    trusted.config = SimpleNamespace(sliding_window=16, rope_parameters={"original_max_position_embeddings": 64})
    pair = Pair(trusted, Port(), made(2, 5), also={"decoding": made(1, 1)})
    told = ["more than the 16 tokens of sliding_window", "positions above 64, where they are scaled"]
    assert untried(pair, {"run"}) == told
    assert untried(Pair(trusted, Port(), made(2, 65)), {"prefill", "decode0"}) == []
    assert untried(Pair(trusted, Port(), {"x": np.zeros((1, 3), np.float32)}), {"run"}) == []


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ([np.zeros((1, 3), np.int64)], "the inputs are a list: name NumPy arrays"),
        ({"ids": torch.zeros(1, 3)}, "input 'ids' is a Tensor: give a NumPy array"),
        ({"ids": np.zeros((1, 3))}, r"input 'ids' is float64, .*ids.astype\(np.float32\)"),
    ],
)
def test_inputs_that_cannot_be_given_to_both_are_named(inputs, told):
    with pytest.raises(ParityError, match=told):
        Pair(Torch(), Port(), inputs)
    with pytest.raises(ParityError, match=told):
        Pair(Torch(), Port(), made(1, 4), also={"another": inputs})


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 4)

    def forward(self, x, skip=None):
        return self.a(x)


class LinearPort(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def __call__(self, x, skip=None):
        return self.a(x)


def test_floats_are_given_in_the_models_dtype_and_what_is_left_out_as_none():
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    pair = Pair(Linear().eval().bfloat16(), LinearPort(), {"x": x, "skip": None})
    copy_weights(pair)
    found = localize_pair(pair)
    assert (found.verdict, found.dtype) == (AGREE, "bfloat16")


class Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.gate = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x, y):
        return y + self.gate(y) * self.a(x)


class GatedPort(nn.Module):
    """Wrong wherever x is not 0 and the gate is open."""

    def __init__(self):
        super().__init__()
        self.a, self.gate = nn.Linear(4, 4), nn.Linear(4, 4)

    def __call__(self, x, y):
        return y + self.gate(y) * self.a(mx.tanh(x))


def shown(x, y, **more):
    pair = Pair(Gated().eval(), GatedPort(), {"x": x, "y": y}, **more)
    copy_weights(pair)
    return localize_pair(pair)


def test_inputs_of_one_value_show_nothing():
    none, some = np.zeros((2, 4), np.float32), np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    found = shown(none, none)
    assert found.verdict == INCONCLUSIVE and "the inputs hold one value throughout" in found.reason
    found = shown(none, some)
    assert found.verdict == AGREE
    assert "of one value throughout, which shows nothing: x" in found.remark
    assert "0 throughout, which shows nothing: a (input)" in found.remark
    assert shown(some, some).verdict == DIVERGE
    assert shown(none, some, also={"noise": {"x": some, "y": some}}).verdict == DIVERGE


def test_what_comes_out_as_0_is_no_agreement():
    trusted = Torch().eval()
    trusted.embed.weight.data.zero_()
    pair = Pair(trusted, Port(), made(1, 4))
    copy_weights(pair)
    found = localize_pair(pair)
    assert found.verdict == INCONCLUSIVE and "the output is 0 throughout" in found.reason
