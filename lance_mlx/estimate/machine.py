"""The machine that a request runs on: what it has, and how fast it computes a layer and a convolution."""

import os
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from lance_mlx.backend.numerics import Numerics
from lance_mlx.estimate.cost import Convolution, expert_weights
from lance_mlx.estimate.estimate import Pass, Sizes, Work, coded
from lance_mlx.model.attention import attention
from lance_mlx.model.mot import ExpertRows, LayerInput, MoTDecoderLayer
from lance_mlx.model.quantized import make_quantized
from lance_mlx.model.rope import rotary_table
from lance_mlx.model.vae_layers import ResidualBlock, StreamState

_FEW, _ROWS = 2, 128
_KEYS = 1024
_SIDE = 32
_ENOUGH = 0.25
"""Seconds of one thing."""
_SLOW = 0.012
"""Seconds of 67 million operations, at which a machine is not given more: with MLX's own BLAS they take some 0.05."""


class Rates(NamedTuple):
    """Measured speeds.

    Attributes:
        layer: seconds that a pass of both experts takes in a layer however few its rows are.
        token: seconds that a layer takes for one row, such as a token of an answer.
        product, convolution: floating point operations a second.
        score: seconds of attention for a query, a key and a head.
    """

    layer: float
    token: float
    product: float
    score: float
    convolution: float


class Seconds(NamedTuple):
    """Time of the parts of a request; reading the checkpoint is not among them."""

    looking: float
    reading: float
    steps: float
    coding: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def memory() -> int:
    """Bytes of the default device's memory."""
    if mx.default_device().type == mx.gpu:
        info = mx.device_info()
        # Metal's name for it, and CUDA's.
        return int(info["memory_size"] if "memory_size" in info else info["total_memory"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def budget() -> int:
    """Bytes that a request may need by an estimate that comes within 25 %, of Metal's working set or of the memory."""
    on_gpu = mx.default_device().type == mx.gpu
    room = mx.device_info().get("max_recommended_working_set_size") if on_gpu else None
    return (room or memory()) * 4 // 5


def measure(sizes: Sizes, numerics: Numerics) -> Rates:
    """Time one layer, attention and a residual block of the VAE at the model's widths, in about a second.

    Between 0.7 and 1.05 times what a request took, where both were measured one after the other on two busy cores: the
    sizes of `estimate.peak_memory`, three steps each.
    """
    config, dtype = sizes.config, numerics.dtype
    layer = MoTDecoderLayer(config)
    # Layers may be quantized otherwise than the one in the middle, but most are as it is.
    prefix = f"language_model.model.layers.{config.num_hidden_layers // 2}."
    own = {path.removeprefix(prefix): how for path, how in sizes.quantized.items() if path.startswith(prefix)}
    make_quantized(layer, own, dtype)
    _zeros(layer, dtype)

    def passed(und: int, gen: int) -> float:
        latents = mx.ones((gen, config.hidden_size), dtype) if gen else None
        x = ExpertRows(mx.ones((und, config.hidden_size), dtype), latents)
        context = LayerInput(rotary_table(np.zeros((3, und + gen), np.int32), config, numerics), None)
        return _seconds(lambda: [rows for rows in layer(x, [context], not gen, bool(gen))[0] if rows is not None])

    # Of each expert more than one row, which quantized weights multiply otherwise.
    token, few = passed(1, 0), passed(2, _FEW)
    factors = mx.ones((_SIDE, _KEYS)), mx.ones((_KEYS, _KEYS))
    # A machine that is slow with little need not be watched at more.
    slow = min(_seconds(lambda: factors[0] @ factors[1]) for _ in range(3)) > _SLOW
    # What is packed takes a while however few rows there are, from which more of them stand out.
    rows, side = (_ROWS // (8 if own else 32), _SIDE // 4) if slow else (_ROWS, _SIDE)
    many = passed(2, rows)
    per_row = max(many - few, many / (2 * rows)) / (rows - _FEW)
    heads, kv_heads = ((n, _KEYS, config.head_dim) for n in (config.num_attention_heads, config.num_key_value_heads))
    queries, keys = mx.zeros((1, heads[0], _ROWS, config.head_dim), dtype), mx.zeros((1, *kv_heads), dtype)
    score = _seconds(lambda: attention(queries, keys, keys, causal=False)) / (heads[0] * _ROWS * _KEYS)
    width = sizes.decoder.up_blocks[-1].in_channels
    block = _zeros(ResidualBlock(width, width), dtype)
    frame = mx.ones((1, side, side, width), dtype)
    operations = 2 * Convolution(side**2, 9, width, width).operations
    convolution = operations / _seconds(lambda: block(frame, StreamState()))
    return Rates(few, token, 2 * expert_weights(config) / per_row, score, convolution)


def seconds_of(sizes: Sizes, rates: Rates, work: Work) -> Seconds:
    """The time that a request takes at these speeds."""
    config, vit = sizes.config, sizes.vit

    def passes(items: tuple[Pass, ...]) -> float:
        return sum(item.times * config.num_hidden_layers * layer(item) for item in items)

    def layer(item: Pass) -> float:
        rows = item.readings * item.rows
        if rows == 1:
            return rates.token + rates.score * config.num_attention_heads * item.keys
        products = 2 * rows * expert_weights(config) / rates.product
        # Without latents one expert of the two has nothing to do.
        fixed = rates.layer * (1 if item.gen else 0.5)
        return fixed + products + rates.score * config.num_attention_heads * rows * item.keys

    weights = vit.hidden_size * (4 * vit.hidden_size + 3 * vit.intermediate_size)
    looking = 2 * work.patches * vit.depth * weights / rates.product
    coding = sum(times * conv.operations for times, conv in coded(sizes, work)) / rates.convolution
    return Seconds(looking, passes(work.reading), passes(work.steps), coding)


def _zeros(module: nn.Module, dtype: mx.Dtype) -> nn.Module:
    def zeros(parameter: mx.array) -> mx.array:
        packed = parameter.dtype in (mx.uint32, mx.uint8)
        return mx.zeros(parameter.shape, parameter.dtype if packed else dtype)

    module.update(tree_map(zeros, module.parameters()))
    mx.eval(module.parameters())
    return module


def _seconds(run: Callable[[], object]) -> float:
    """Median time of up to five runs in a quarter of a second, after one that warms up, or of that if it is slow."""
    times: list[float] = []
    while len(times) < 2 or (len(times) < 6 and sum(times[1:]) < _ENOUGH):
        started = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - started)
        if times[0] > _ENOUGH:
            return times[0]
    return median(times[1:])
