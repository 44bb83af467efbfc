"""Embeddings of times, and pictures as patches and back: which waves, and in which order."""

import math
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

from parity import localize_pair
from parity.comparison.verdict import AGREE, DIVERGE
from parity.laws.rearrangement import layout_of
from parity.pairs import Pair, copy_weights

WIDTH, PATCH, CHANNELS, SIDE = 32, 2, 3, 8
GRID = SIDE // PATCH


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.proj = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(CHANNELS * PATCH**2, WIDTH)
        self.out = torch.nn.Linear(WIDTH, CHANNELS * PATCH**2)

    def forward(self, x, t):
        waves = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(WIDTH // 2) / (WIDTH // 2))
        time = self.time(torch.cat([waves.cos(), waves.sin()], -1).to(x.dtype))
        x = x.reshape(-1, CHANNELS, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        x = self.out(self.proj(x) + time[:, None]).reshape(-1, GRID, GRID, PATCH, PATCH, CHANNELS)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, CHANNELS, SIDE, SIDE)


class Port(nn.Module):
    def __init__(self, fault=""):
        super().__init__()
        self.time, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(CHANNELS * PATCH**2, WIDTH)
        self.out = nn.Linear(WIDTH, CHANNELS * PATCH**2)
        self._fault = fault

    def __call__(self, x, t):
        fault, count = self._fault, WIDTH // 2
        period = {"a shorter period": 1000, "an odd period": 7777}.get(fault, 10000)
        over = {"to the end": count - 1, "over all channels": WIDTH}.get(fault, count)
        t = t.astype(mx.bfloat16) if fault == "rounded times" else t
        waves = t[:, None].astype(mx.float32) * mx.exp(-math.log(period) * mx.arange(count) / over)
        waves = waves * (0.5 if fault == "halved" else 1)
        parts = [mx.sin(waves), mx.cos(waves)] if fault == "sines" else [mx.cos(waves), mx.sin(waves)]
        time = mx.stack(parts, -1).flatten(1) if fault == "alternate" else mx.concatenate(parts, -1)
        time = self.time(time.astype(x.dtype))
        order = {"channels first": (0, 2, 4, 1, 3, 5), "columns first": (0, 4, 2, 3, 5, 1)}.get(
            fault, (0, 2, 4, 3, 5, 1)
        )
        x = x.reshape(-1, CHANNELS, GRID, PATCH, GRID, PATCH).transpose(*order).reshape(len(x), GRID**2, -1)
        x = self.out(self.proj(x) + time[:, None])
        sides = (CHANNELS, PATCH, PATCH) if fault == "channels outside" else (PATCH, PATCH, CHANNELS)
        order = {"channels outside": (0, 3, 1, 4, 2, 5), "turned patches": (0, 5, 1, 4, 2, 3)}.get(
            fault, (0, 5, 1, 3, 2, 4)
        )
        return x.reshape(-1, GRID, GRID, *sides).transpose(*order).reshape(-1, CHANNELS, SIDE, SIDE)


def found(fault, dtype):
    torch.manual_seed(0)
    x = np.random.default_rng(1).standard_normal((2, CHANNELS, SIDE, SIDE)).astype(np.float32)
    pair = Pair(Model().eval().to(getattr(torch, dtype)), Port(fault), {"x": x, "t": np.array([13, 701])})
    copy_weights(pair)
    return localize_pair(pair)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("fault", "place", "cause"),
    [
        ("", None, None),
        ("sines", "time (input)", "sines come first"),
        ("alternate", "time (input)", "cosines and sines alternate"),
        ("a shorter period", "time (input)", "the longest period is 1000"),
        ("an odd period", "time (input)", r"the longest period is 77\d\d"),
        ("over all channels", "time (input)", "the longest period is 100$"),
        ("to the end", "time (input)", "frequencies are spaced by their number less 1"),
        ("halved", "time (input)", "the embedded number counts 0.5 times"),
        ("rounded times", "time (input)", "the embedded number is rounded to bfloat16"),
        ("channels first", "proj (input)", r"-> a \(c e\) \(b d f\)' instead of|channels are read as 4 x 3 transposed"),
        (
            "columns first",
            "proj (input)",
            r"-> a \(e c\) \(d f b\)' instead of|tokens of every 16 are read as 4 x 4 transposed",
        ),
        (
            "channels outside",
            "output",
            r"^out is laid out as 'a \(b c\) \(d e f\) -> a d \(b e\) \(c f\)', with .* d=3",
        ),
        ("turned patches", "output", r"-> a f \(b e\) \(c d\)' instead of"),
    ],
)
def test_times_and_patches(fault, place, cause, dtype):
    result = found(fault, dtype)
    assert result.verdict == (DIVERGE if fault else AGREE), result.findings
    if fault:
        assert result.first.component == place
        assert result.first.certain and re.search(cause, result.first.explanations[0].name), result.first


def test_layouts_are_read_where_values_are_alike():
    source = np.random.default_rng(0).integers(0, 3000, (2, 6, 10, 4)).astype(np.float32)
    made = source.reshape(2, 2, 3, 10, 4).transpose(0, 3, 1, 4, 2)[..., ::-1].reshape(20, 24)
    layout = layout_of(source, made)
    assert layout is not None and np.array_equal(layout.of(source), made)
    assert layout_of(source, np.sort(made, axis=1)) is None
    assert layout_of(np.zeros((4, 4)), np.zeros((2, 8))) is None
