"""Blocks of diffusion transformers and convolutional nets: modulations, gates, layer scales, depthwise kernels."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

from parity import localize_pair
from parity.comparison.verdict import AGREE, DIVERGE
from parity.pairs import Pair, copy_weights

BATCH, TOKENS, WIDTH, SIDE = 2, 12, 16, 7


class Block(torch.nn.Module):
    """One block with adaptive layer norms."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (torch.nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.ada, self.attn, self.mlp = (torch.nn.Linear(WIDTH, n) for n in (6 * WIDTH, WIDTH, WIDTH))

    def forward(self, x, t):
        a, b, c, d, e, f = self.ada(torch.nn.functional.silu(t))[:, None].chunk(6, -1)
        x = x + c * self.attn(self.norm1(x) * (1 + b) + a)
        return x + f * self.mlp(self.norm2(x) * (1 + e) + d)


class BlockPort(nn.Module):
    def __init__(self, fault=""):
        super().__init__()
        self.ada, self.attn, self.mlp = (nn.Linear(WIDTH, n) for n in (6 * WIDTH, WIDTH, WIDTH))
        self._fault = fault

    def __call__(self, x, t):
        made, fault = self.ada(nn.silu(t))[:, None], self._fault
        parts = mx.split(made, 6, -1)
        if fault == "interleaved":
            parts = [made[..., i::6] for i in range(6)]
        if fault == "shift and scale":
            parts = [parts[i] for i in (1, 0, 2, 4, 3, 5)]
        a, b, c, d, e, f = parts
        c = {"tanh": mx.tanh(c), "no gate": mx.ones_like(c)}.get(fault, c)
        one = 0 if fault == "no 1" else 1
        eps = 1e-3 if fault == "eps" else 1e-6
        x = x + c * self.attn(mx.fast.layer_norm(x, None, None, eps) * (one + b) + a)
        n = mx.fast.layer_norm(x, None, None, 1e-6) * (1 + e) + d
        return (n if fault == "normed" else x) + f * self.mlp(n)


class Depthwise(torch.nn.Module):
    """A depthwise convolution with a layer scale."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(WIDTH, WIDTH, 5, padding=2, groups=WIDTH)
        self.out = torch.nn.Linear(WIDTH, WIDTH)
        self.gamma = torch.nn.Parameter(torch.full((WIDTH,), 0.3))

    def forward(self, x):
        return x + (self.gamma * self.out(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class DepthwisePort(nn.Module):
    def __init__(self, fault=""):
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 5, padding=2, groups=WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.gamma = mx.ones(WIDTH)
        self._fault = fault

    def __call__(self, x):
        x, fault, kernel = x.transpose(0, 2, 3, 1), self._fault, self.conv.weight
        kernel = {"flipped": kernel[:, ::-1, ::-1], "turned": kernel.swapaxes(1, 2)}.get(fault, kernel)
        made = self.out(mx.conv2d(x, kernel, padding=2, groups=WIDTH) + self.conv.bias)
        gamma = {"no scale": 1, "twice": self.gamma**2}.get(fault, self.gamma)
        return ((self.gamma if fault == "of x" else 1) * x + gamma * made).transpose(0, 3, 1, 2)


def found(trusted, port, dtype="float32", **inputs):
    torch.manual_seed(2)
    trusted = trusted.eval()
    for parameter in trusted.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    pair = Pair(trusted.to(getattr(torch, dtype)), port, inputs)
    copy_weights(pair)
    return localize_pair(pair)


def noise(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("fault", "place", "cause"),
    [
        ("", None, None),
        ("shift and scale", "attn (input)", "norm1 is multiplied by 1 + chunk 0 of 6 of ada instead of 1 + chunk 1 of"),
        ("interleaved", "attn (input)", "each 6th channel of ada from 1 on"),
        ("no 1", "attn (input)", "norm1 is multiplied by chunk 1 of 6 of ada instead of 1 + chunk 1 of 6 of ada"),
        ("eps", "attn (input)", "eps is 0.001"),
        ("tanh", "mlp (input)", "attn is multiplied by tanh of chunk 2 of 6 of ada"),
        ("no gate", "mlp (input)", "attn is not multiplied by chunk 2 of 6 of ada"),
        ("normed", "output", "the input of mlp stands in the place of"),
    ],
)
def test_adaptive_layer_norms(fault, place, cause, dtype):
    if fault == "eps" and dtype == "bfloat16":
        pytest.skip("no more than rounding")
    result = found(Block(), BlockPort(fault), dtype, x=noise(BATCH, TOKENS, WIDTH), t=noise(BATCH, WIDTH))
    assert result.verdict == (DIVERGE if fault else AGREE), result.findings
    if fault:
        assert result.first.component == place
        assert result.first.certain and cause in result.first.explanations[0].name


@pytest.mark.parametrize(
    ("fault", "place", "cause"),
    [
        ("", None, None),
        ("flipped", "out (input)", "the kernel is reversed in rows and columns"),
        ("turned", "out (input)", "the kernel's rows and columns are exchanged"),
        ("no scale", "output", "out is not multiplied by gamma"),
        ("twice", "output", "out is multiplied by the square of gamma instead of gamma"),
        ("of x", "output", "multiplied by gamma"),
    ],
)
def test_depthwise_kernels_and_layer_scales(fault, place, cause):
    result = found(Depthwise(), DepthwisePort(fault), x=noise(BATCH, WIDTH, SIDE, SIDE))
    assert result.verdict == (DIVERGE if fault else AGREE), result.findings
    if fault:
        assert result.first.component == place
        assert result.first.certain and cause in result.first.explanations[0].name, result.first


class Channels(torch.nn.Module):
    """A layer norm over the channels of each place, and the mean of places."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = Norm(), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.out(self.norm(x).mean((2, 3)))


class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(torch.ones(WIDTH)) for _ in range(2))
        self.eps = 1e-6

    def forward(self, x):
        x = torch.nn.functional.layer_norm(x.movedim(1, -1), (WIDTH,), self.weight, self.bias, self.eps)
        return x.movedim(-1, 1)


class ChannelsPort(nn.Module):
    def __init__(self, fault=""):
        super().__init__()
        self.norm, self.out = NormPort(fault), nn.Linear(WIDTH, WIDTH)
        self._fault = fault

    def __call__(self, x):
        x = self.norm(x.transpose(0, 2, 3, 1))
        return self.out(x.max((1, 2)) if self._fault == "largest" else x.mean((1, 2)))


class NormPort(nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.weight, self.bias = mx.ones(WIDTH), mx.zeros(WIDTH)
        self._axes, self._less = (1, 2) if fault == "places" else -1, fault == "sample"

    def __call__(self, x):
        off = x - x.mean(self._axes, keepdims=True)
        power = off.var(self._axes, keepdims=True, ddof=int(self._less))
        return off * mx.rsqrt(power + 1e-6) * self.weight + self.bias


@pytest.mark.parametrize(
    ("fault", "place", "cause"),
    [
        ("", None, None),
        ("places", "norm", "each channel is normed over all places"),
        ("sample", "norm", "the variance is that of a sample"),
        ("largest", "out (input)", "norm, the largest of places is in its place"),
    ],
)
def test_norms_and_means_of_pictures(fault, place, cause):
    result = found(Channels(), ChannelsPort(fault), x=noise(BATCH, WIDTH, SIDE, SIDE))
    assert result.verdict == (DIVERGE if fault else AGREE), result.findings
    if fault:
        assert result.first.component == place
        assert result.first.certain and cause in result.first.explanations[0].name, result.first
