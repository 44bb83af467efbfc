"""The vision tower: patches, rotations, attention and merging done otherwise."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from blind_faults.common import half, low_rank, outputs, pair, parameters, plain, precision, small, zeroed
from lance_mlx.backend.numerics import Numerics
from lance_mlx.model import windows
from lance_mlx.model.layers import Linear
from lance_mlx.model.rope import RotaryTable
from lance_mlx.model.vit import (
    PatchMerger,
    PatchProjection,
    VisionAttention,
    VisionBlock,
)
from lance_mlx.model.windows import Segments
from parity.lance.faults.base import FLOAT32, LOOKS, Patch, calls, function, together

_ROPE = "vit_model.blocks.*.attn.?_rope"
_VIDEOS = frozenset({"x2t_video", "video_edit"})
Table = Callable[[np.ndarray, int], np.ndarray]


def _rotated(angles: Table) -> Patch:
    """A patch of the ViT's angles float32 [n, head_dim // 2], of positions [2, n] and head_dim."""

    def call(original: Callable, positions: np.ndarray, head_dim: int, numerics: Numerics) -> RotaryTable:
        wide = angles(positions, head_dim).astype(np.float64)
        cos, sin = (mx.array(f(wide).astype(np.float32)[:, None]).astype(numerics.dtype) for f in (np.cos, np.sin))
        return RotaryTable(positions, cos, sin)

    return function(windows, "vision_rotary_table", call)


def _frequencies(head_dim: int, width: int) -> np.ndarray:
    return 10000.0 ** -(np.arange(0, head_dim // 2, 2) / width)


def _whole_head(positions: np.ndarray, head_dim: int) -> np.ndarray:
    return np.concatenate(list(positions[..., None] * _frequencies(head_dim, head_dim)), axis=-1)


def _by_heads(y: mx.array) -> mx.array:
    """Rows whose thirds are queries, keys and values, read as if each head's three were together."""
    return y.reshape(len(y), 2, 3, 16).swapaxes(1, 2).reshape(y.shape)


def _normed_together(original: Callable, module: PatchMerger, x: mx.array) -> mx.array:
    wide = x.reshape(-1, module._width).astype(mx.float32)
    wide = wide * mx.rsqrt(mx.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    weight = mx.tile(module.ln_q.weight.astype(mx.float32), 4)
    x = (wide * weight).astype(x.dtype)
    for layer in module.mlp:
        x = layer(x)
    return x


def _across_time(original: Callable, keys: np.ndarray) -> np.ndarray:
    # Slices are runs of (grid, t); without t they are whole videos.
    return original(keys[:1]) if len(keys) == 2 else original(keys)


def _unchanged(original: Callable, module: VisionBlock, x: mx.array, *rest: object) -> mx.array:
    return x


def _first_kernel_twice(weight: mx.array) -> mx.array:
    return mx.concatenate([weight[:, :, :1], weight[:, :, :1]], axis=2)


def _one_head(
    original: Callable, module: VisionAttention, x: mx.array, rotary: RotaryTable, segments: Segments
) -> mx.array:
    queries, keys, values = mx.split(module.qkv(x).reshape(len(x), 3 * module._num_heads, -1), 3, axis=1)
    queries = module.q_rope(queries.astype(mx.float32), rotary).astype(x.dtype)
    keys = module.k_rope(keys.astype(mx.float32), rotary).astype(x.dtype)
    attended = segments.attend(queries, keys, values)
    attended = mx.concatenate([attended[:, :1], mx.zeros_like(attended[:, 1:])], axis=1)
    return module.proj(attended.flatten(1))


FAULTS = [
    plain(
        "blind-vit-rope-exponents-of-a-whole-head",
        _ROPE,
        _rotated(_whole_head),
        "The ViT's rotary exponents are divided by head_dim instead of by head_dim / 2: every frequency is the square "
        "root of what it should be.",
        tasks=LOOKS,
    ),
    plain(
        "blind-vit-qkv-by-heads",
        "vit_model.blocks.*.attn.*",
        outputs(Linear, _by_heads, "vit_model.blocks.*.attn.qkv"),
        "The rows of the ViT's qkv are read as (head, part, channel) instead of as (part, head, channel).",
        tasks=LOOKS,
    ),
    plain(
        "blind-vit-first-temporal-kernel-twice",
        "vit_model.patch_embed*",
        parameters(_first_kernel_twice, "vit_model.patch_embed.proj"),
        "Both frames of a patch meet the kernel of the first one.",
        tasks=LOOKS,
    ),
    plain(
        "blind-vit-merger-normed-together",
        "vit_model.merger*",
        calls(PatchMerger, _normed_together, "vit_model.merger"),
        "The merger norms the four patches of a token as one vector of 128 instead of each by itself.",
        tasks=LOOKS,
    ),
    plain(
        "blind-vit-full-attention-across-time",
        "vit_model.blocks.1.attn*",
        function(windows, "run_lengths", _across_time),
        "The blocks with full attention see all frames of a video at once instead of each temporal slice by itself.",
        tasks=_VIDEOS,
    ),
    plain(
        "blind-vit-output-divided",
        "vit_model.merger*",
        outputs(Linear, lambda y: y * 64**-0.5, "vit_model.merger.mlp.2"),
        "What the merger gives is divided by the root of the language model's width, sqrt(64) = 8, as PaliGemma does.",
        tasks=LOOKS,
    ),
    small(
        "blind-vit-last-block-skipped",
        "vit_model.blocks.3*",
        calls(VisionBlock, _unchanged, "vit_model.blocks.3"),
        "The last block of the ViT is left out, as of towers whose features are taken from the layer before the last.",
        tasks=LOOKS,
    ),
    small(
        "blind-vit-head-one-of-block-two-lost",
        "vit_model.blocks.2.attn*",
        calls(VisionAttention, _one_head, "vit_model.blocks.2.attn"),
        "Head 1 of the ViT's block 2 gives zeros: it was pruned.",
        tasks=LOOKS,
    ),
    small(
        "blind-vit-last-patch-empty",
        "vit_model.patch_embed*",
        outputs(PatchProjection, zeroed(-1), "vit_model.patch_embed.proj"),
        "The last patch of all is embedded as zeros: the buffer was one patch short.",
        tasks=LOOKS,
    ),
    small(
        "blind-vit-bias-of-one-block",
        "vit_model.blocks.1.attn.proj",
        parameters(lambda b: 0 * b, "vit_model.blocks.1.attn.proj", name="bias"),
        "The bias of the attention's output projection is zero in block 1 of the ViT.",
        tasks=LOOKS,
    ),
    precision(
        "blind-vit-stream-float16",
        "vit_model.blocks.*",
        outputs(VisionBlock, half, "vit_model.blocks.?"),
        "The ViT's residual stream is rounded to float16 after every block of a float32 run.",
        tasks=LOOKS,
        dtypes=FLOAT32,
    ),
    precision(
        "blind-vit-lora-in-qkv",
        "vit_model.blocks.*.attn.qkv",
        parameters(low_rank(2, 0.02, seed=3), "vit_model.blocks.*.attn.qkv"),
        "A LoRA of rank 2, 2 % as long as the weight, remains in the ViT's qkv.",
        tasks=LOOKS,
    ),
    pair(
        "blind-pair-vit-rope-and-qkv",
        "vit_model.blocks.*.attn.*",
        together(_rotated(_whole_head), outputs(Linear, _by_heads, "vit_model.blocks.*.attn.qkv")),
        "Two faults of the ViT's attention at once: the rotary exponents are divided by head_dim instead of by half of "
        "it, and the rows of qkv are read as (head, part, channel).",
        tasks=LOOKS,
    ),
]
