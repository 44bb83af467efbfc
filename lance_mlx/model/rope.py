"""Multimodal rotary position embedding."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lance_mlx.backend.numerics import Numerics
from lance_mlx.config import LanceConfig
from lance_mlx.model.layers import fused


@dataclass(frozen=True, eq=False)
class RotaryTable:
    """Rotation of every token of a pass, computed once and used by all layers and steps.

    Attributes:
        position_ids: int32 [axes, n], the ids that the angles come from; three axes, or two in the ViT.
        cos, sin: [n, 1, head_dim // 2].
    """

    position_ids: np.ndarray
    cos: mx.array
    sin: mx.array


def inverse_frequencies(config: LanceConfig, numerics: Numerics) -> np.ndarray:
    """theta ** (-2i / head_dim), float32 [head_dim // 2], rounded to the policy's dtype where the launcher rounds
    them."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    # The power is rounded once from float64, which comes closest to PyTorch's float32 power.
    powers = np.power(np.float64(config.rope_theta), exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / powers
    if numerics.round_rope_frequencies:
        frequencies = np.array(mx.array(frequencies).astype(numerics.dtype).astype(mx.float32))
    return frequencies


def rotary_table(position_ids: np.ndarray, config: LanceConfig, numerics: Numerics) -> RotaryTable:
    """The rotation of tokens at `position_ids` (int32 [3, n]): each frequency follows the axis of its mrope section.

    Angles are float32 products as upstream's; their cosines are taken on the host, because GPU kernels lose accuracy at
    the large angles of long videos.
    """
    axes = np.repeat(np.arange(3), config.mrope_section)
    angles = position_ids[axes].T.astype(np.float32) * inverse_frequencies(config, numerics)
    wide = angles.astype(np.float64)
    cos, sin = (mx.array(f(wide).astype(np.float32)[:, None, :]).astype(numerics.dtype) for f in (np.cos, np.sin))
    return RotaryTable(position_ids, cos, sin)


@fused
def _turn(first: mx.array, second: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    turned = _product(first, cos) - _product(second, sin), _product(second, cos) + _product(first, sin)
    return mx.concatenate(turned, axis=-1)


def _product(x: mx.array, factor: mx.array) -> mx.array:
    """x * factor, rounded to the dtype of `x` as in PyTorch.

    Without the casts a GPU's compiler would leave bfloat16 products unrounded until they are added.
    """
    return (x.astype(mx.float32) * factor.astype(mx.float32)).astype(x.dtype)


class Rotary(nn.Module):
    """Rotates the two halves of every head against each other."""

    def __call__(self, x: mx.array, table: RotaryTable) -> mx.array:
        """[n, heads, head_dim] -> the same shape and dtype."""
        # Apart before: what is compiled for all shapes at once can hold no split.
        return _turn(*mx.split(x, 2, axis=-1), table.cos, table.sin)
