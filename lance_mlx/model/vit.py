"""Qwen2.5-VL's vision transformer: patches of images and videos to tokens of the language model.

Shapes: n patches over all grids; `unit` = spatial_merge_size ** 2 neighbouring patches become one token. Patches come
in reading order of the tokens, the patches of a token together. Inside the blocks tokens stand in window order, so that
every window, and every temporal slice, is a contiguous run of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lance_mlx.backend.numerics import Numerics, runs_on_cpu
from lance_mlx.config import check_keys, integer, read_config
from lance_mlx.errors import LanceError
from lance_mlx.model.layers import MLP, Linear, fused
from lance_mlx.model.rope import Rotary, RotaryTable
from lance_mlx.model.windows import (
    Grid,
    Segments,
    inverse_order,
    patch_positions,
    run_lengths,
    token_coordinates,
    vision_rotary_table,
    window_order,
)

_COLOR_CHANNELS = 3
NORM_EPS = 1e-6
_SIZE_KEYS = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "out_hidden_size",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "window_size",
)
# Keys with the one value that the implementation computes.
_FIXED_KEYS = {
    "model_type": ("qwen2_5_vl", "qwen2_5_vl_vision"),
    "hidden_act": ("silu",),
    "in_chans": (_COLOR_CHANNELS,),
    "in_channels": (_COLOR_CHANNELS,),
}
# Keys that change nothing here; `tokens_per_second` spaces positions in the language model, which has its own.
_INERT_KEYS = frozenset(
    """
    architectures initializer_range tokens_per_second torch_dtype dtype transformers_version _name_or_path
    _attn_implementation _attn_implementation_autoset
    """.split()
)


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of the vision transformer (Qwen2.5-VL-ViT/config.json).

    Attributes:
        out_hidden_size: width of the tokens it returns, the language model's hidden size.
        patch_size: pixels per patch, along height and along width.
        temporal_patch_size: frames per patch.
        spatial_merge_size: patches per token, along height and along width.
        window_size: pixels along each side of an attention window.
        fullatt_block_indexes: blocks that attend to the whole temporal slice instead of to windows.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_shape(self) -> tuple[int, int, int, int]:
        """(channels, frames, rows, columns) of a patch, in the order in which its values are laid out."""
        return (_COLOR_CHANNELS, self.temporal_patch_size, self.patch_size, self.patch_size)

    @property
    def window_tokens(self) -> int:
        """Tokens along each side of a window."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    @classmethod
    def from_file(cls, path: Path) -> "ViTConfig":
        """Read the vision tower's config.json; raises LanceError naming a missing, unknown or contradictory key."""
        return read_config(path, cls.from_dict, "it comes with the official checkpoint's vision tower")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ViTConfig":
        """Build from the keys of the vision tower's config.json; raises LanceError as `from_file` does."""
        known = {*_SIZE_KEYS, *_FIXED_KEYS, *_INERT_KEYS, "spatial_patch_size", "fullatt_block_indexes"}
        check_keys(values, known, _FIXED_KEYS)
        blocks = values.get("fullatt_block_indexes")
        if not isinstance(blocks, list) or any(isinstance(j, bool) or not isinstance(j, int) for j in blocks):
            raise LanceError(f"'fullatt_block_indexes' must be a list of integers, not {blocks!r}")
        config = cls(**{key: integer(values, key) for key in _SIZE_KEYS}, fullatt_block_indexes=tuple(blocks))
        patch_size = values.get("spatial_patch_size", config.patch_size)
        if patch_size != config.patch_size:
            raise LanceError(f"spatial_patch_size {patch_size!r} contradicts patch_size {config.patch_size}")
        # Half of a head's rotary pairs turn with the row, the other half with the column.
        if config.hidden_size % (4 * config.num_heads):
            raise LanceError(f"hidden_size {config.hidden_size} is not a multiple of 4 * num_heads {config.num_heads}")
        if config.window_tokens < 1:
            raise LanceError(f"window_size {config.window_size} is smaller than a token")
        if any(not 0 <= j < config.depth for j in blocks):
            raise LanceError(f"fullatt_block_indexes {blocks} names a block outside depth {config.depth}")
        return config


class PatchProjection(nn.Module):
    """The checkpoint's convolution, whose stride is its kernel: one product a patch."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.weight = mx.zeros((config.hidden_size, *config.patch_shape))

    def __call__(self, patches: mx.array) -> mx.array:
        """[n, channels * frames * rows * columns] -> [n, hidden] in the dtype of `weight`."""
        dtype, weight = self.weight.dtype, self.weight.flatten(1)
        patches = patches.astype(dtype)
        if runs_on_cpu():
            # The CPU backend multiplies half precision outside BLAS; float32 gives the same bits sooner.
            patches, weight = patches.astype(mx.float32), weight.astype(mx.float32)
        return (patches @ weight.T).astype(dtype)


class PatchEmbed(nn.Module):
    """Patches to hidden states, in the order of the input."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = PatchProjection(config)

    def __call__(self, patches: mx.array) -> mx.array:
        """[n, patch] -> [n, hidden]."""
        return self.proj(patches)


class VisionAttention(nn.Module):
    """Self-attention inside windows or temporal slices."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self._num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)
        self.q_rope = Rotary()
        self.k_rope = Rotary()

    def __call__(self, x: mx.array, rotary: RotaryTable, segments: Segments) -> mx.array:
        """[n, hidden] -> [n, hidden]."""
        queries, keys, values = mx.split(self.qkv(x).reshape(len(x), 3 * self._num_heads, -1), 3, axis=1)
        # Upstream rotates in float32 and rounds once before attention.
        queries = self.q_rope(queries.astype(mx.float32), rotary).astype(x.dtype)
        keys = self.k_rope(keys.astype(mx.float32), rotary).astype(x.dtype)
        return self.proj(segments.attend(queries, keys, values).flatten(1))


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.hidden_size, NORM_EPS)
        self.norm2 = nn.RMSNorm(config.hidden_size, NORM_EPS)
        self.attn = VisionAttention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=True)

    def __call__(self, x: mx.array, rotary: RotaryTable, segments: Segments) -> mx.array:
        """Residual stream in and out, [n, hidden]."""
        x = x + self.attn(self.norm1(x), rotary, segments)
        return x + self.mlp(self.norm2(x))


@fused
def _gelu(x: mx.array) -> mx.array:
    wide = x.astype(mx.float32)
    return (wide * (1 + mx.erf(wide * 0.5**0.5)) * 0.5).astype(x.dtype)


class GELU(nn.Module):
    """x times the normal distribution function of x, computed in float32 and rounded once."""

    def __call__(self, x: mx.array) -> mx.array:
        return _gelu(x)


class PatchMerger(nn.Module):
    """The patches of a token, side by side, to the language model's width."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self._width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = nn.RMSNorm(config.hidden_size, NORM_EPS)
        self.mlp = [Linear(self._width, self._width), GELU(), Linear(self._width, config.out_hidden_size)]

    def __call__(self, x: mx.array) -> mx.array:
        """[n, hidden] -> [n / unit, out_hidden_size]."""
        x = self.ln_q(x).reshape(-1, self._width)
        for layer in self.mlp:
            x = layer(x)
        return x


class VisionTransformer(nn.Module):
    """The vision tower, with the checkpoint's parameter names and shapes (modeling/vit/qwen2_5_vl_vit.py)."""

    def __init__(self, config: ViTConfig, numerics: Numerics) -> None:
        super().__init__()
        self._config, self._numerics = config, numerics
        self.patch_embed = PatchEmbed(config)
        self.blocks = [VisionBlock(config) for _ in range(config.depth)]
        self.merger = PatchMerger(config)

    @property
    def config(self) -> ViTConfig:
        return self._config

    def __call__(self, patches: mx.array, grids: Sequence[Grid]) -> mx.array:
        """Tokens of all grids in reading order, [n / unit, out_hidden_size]; grids do not see each other.

        Args:
            patches: [n, 1176] at the official sizes: values in (channel, frame, row, column) order, normalised.
            grids: (t, h, w) of each image or video, in patches; t * h * w add up to n.

        Raises:
            LanceError: a grid that cannot be merged, or patches that do not fill the grids.
        """
        config = self._config
        merge, unit = config.spatial_merge_size, config.spatial_merge_size**2
        self._check(patches.shape, grids)
        coordinates = token_coordinates(grids, merge)
        order, windows = window_order(coordinates, config.window_tokens)
        # Window order keeps every temporal slice together, so its rows are a run in it as well.
        whole, windowed = Segments(run_lengths(coordinates[:2]) * unit), Segments(windows * unit)
        rotary = vision_rotary_table(patch_positions(coordinates[:, order], merge), config.head_dim, self._numerics)
        x = self.patch_embed(patches)
        x = x.reshape(-1, unit, config.hidden_size)[mx.array(order)].flatten(0, 1)
        for index, block in enumerate(self.blocks):
            x = block(x, rotary, whole if index in config.fullatt_block_indexes else windowed)
        return self.merger(x)[mx.array(inverse_order(order))]

    def _check(self, shape: tuple[int, ...], grids: Sequence[Grid]) -> None:
        merge = self._config.spatial_merge_size
        for t, h, w in grids:
            if min(t, h, w) < 1 or h % merge or w % merge:
                raise LanceError(f"grid {t}x{h}x{w}: h and w must be positive multiples of {merge} patches")
        expected = (sum(t * h * w for t, h, w in grids), int(np.prod(self._config.patch_shape)))
        if not grids or tuple(shape) != expected:
            raise LanceError(f"patches of shape {list(shape)} do not fill the grids, which need {list(expected)}")
