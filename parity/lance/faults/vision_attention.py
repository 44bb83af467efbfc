"""Faults of the ViT's attention: which patches see each other, and how they are rotated."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np

from lance_mlx.backend.numerics import Numerics
from lance_mlx.model import vit, windows
from lance_mlx.model.rope import Rotary, RotaryTable
from lance_mlx.model.vit import VisionAttention
from lance_mlx.model.windows import Segments
from parity.lance.faults.base import (
    BFLOAT16,
    LOOKS,
    Need,
    Patch,
    Target,
    calls,
    explained,
    method,
    replaced,
    wrapped,
)
from parity.lance.faults.rope import turn_pairs
from parity.lance.faults.vision import WINDOWS, grids_of

_ATTENTION = "vit_model.blocks.*.attn.*"


_LARGE = Need(
    "a picture of 672 pixels a side for the ViT: rounded frequencies matter far from the corner",
    lambda bundle: any(max(h, w) >= 48 for _, h, w in grids_of(bundle)),
)
_FRAMES = Need("more than two frames to look at", lambda bundle: any(t > 1 for t, _, _ in grids_of(bundle)))


def _full_attention(blocks: Callable[[int], Sequence[int]]) -> Patch:
    """Choose which blocks attend to whole slices, given how many blocks there are."""

    @contextmanager
    def patch(target: Target) -> Iterator[None]:
        with ExitStack() as stack:
            for model in target.modules("vit_model").values():
                config = replace(model.config, fullatt_block_indexes=tuple(blocks(model.config.depth)))
                stack.enter_context(replaced(model, "_config", config))
            yield

    return patch


def _causally(original: Callable, queries: mx.array, keys: mx.array, values: mx.array, causal: bool) -> mx.array:
    return original(queries, keys, values, causal=True)


def _exact(original: Callable, positions: np.ndarray, head_dim: int, numerics: Numerics) -> RotaryTable:
    return original(positions, head_dim, replace(numerics, round_rope_frequencies=False))


def _alternating(original: Callable, positions: np.ndarray, head_dim: int, numerics: Numerics) -> RotaryTable:
    table = original(positions, head_dim, numerics)
    order = mx.array(np.arange(head_dim // 2).reshape(2, -1).T.flatten())
    return replace(table, cos=table.cos[..., order], sin=table.sin[..., order])


def _in_reading_order(original: Callable, coordinates: np.ndarray, merge: int) -> np.ndarray:
    positions = original(coordinates, merge)
    grid, t = np.repeat(coordinates[:2], merge**2, axis=1)
    return positions[:, np.lexsort((positions[1], positions[0], t, grid))]


def _pairs(original: Callable, module: Rotary, x: mx.array, table: RotaryTable) -> mx.array:
    return turn_pairs(original, module, x, table)


def _head_by_head(
    original: Callable, module: VisionAttention, x: mx.array, rotary: RotaryTable, segments: Segments
) -> mx.array:
    heads = module._num_heads
    qkv = module.qkv(x).reshape(len(x), heads, 3, -1).swapaxes(1, 2)
    queries, keys, values = qkv[:, 0], qkv[:, 1], qkv[:, 2]
    queries = module.q_rope(queries.astype(mx.float32), rotary).astype(x.dtype)
    keys = module.k_rope(keys.astype(mx.float32), rotary).astype(x.dtype)
    return module.proj(segments.attend(queries, keys, values).flatten(1))


_fault = partial(explained, tasks=LOOKS)

FAULTS = [
    _fault(
        "vit-full-attention-everywhere",
        _ATTENTION,
        "every block attends to the whole slice",
        _full_attention(range),
        "Every block attends to the whole temporal slice, none to windows.",
        needs=WINDOWS,
    ),
    _fault(
        "vit-windows-everywhere",
        _ATTENTION,
        "every block attends to windows",
        _full_attention(lambda depth: ()),
        "Every block attends to windows, none to the whole temporal slice.",
        needs=WINDOWS,
    ),
    _fault(
        "vit-frames-see-each-other",
        _ATTENTION,
        "blocks attend across frames",
        lambda target: wrapped(vit, "run_lengths", lambda original, keys: original(keys[:1])),
        "The blocks with full attention attend to the whole video instead of to each temporal slice.",
        tasks=frozenset({"video_edit", "x2t_video"}),
        needs=_FRAMES,
    ),
    _fault(
        "vit-attends-causally",
        _ATTENTION,
        "blocks attend causally",
        lambda target: wrapped(windows, "attention", _causally),
        "Patches see only those before them.",
    ),
    _fault(
        "vit-rope-columns-first",
        _ATTENTION,
        "the ViT's RoPE takes columns before rows",
        lambda target: wrapped(vit, "patch_positions", lambda original, *args: original(*args)[::-1]),
        "The first half of the ViT's rotary angles follows columns and the second rows.",
    ),
    _fault(
        "vit-rope-pairs",
        _ATTENTION,
        "the ViT's RoPE turns neighbouring pairs",
        calls(Rotary, _pairs, "vit_model.blocks.*.attn.?_rope"),
        "The ViT's RoPE turns the neighbouring channels 2i and 2i+1 against each other instead of a head's halves.",
    ),
    _fault(
        "vit-rope-alternates",
        _ATTENTION,
        "the ViT's RoPE alternates rows and columns",
        lambda target: wrapped(vit, "vision_rotary_table", _alternating),
        "The ViT's rotary angles follow rows and columns in turn instead of half each.",
    ),
    _fault(
        "vit-rope-frequencies-exact",
        _ATTENTION,
        "the ViT's RoPE frequencies are not rounded",
        lambda target: wrapped(vit, "vision_rotary_table", _exact),
        "The ViT's rotary frequencies and angles stay float32 where upstream's launcher rounds them to bfloat16.",
        dtypes=BFLOAT16,
        needs=_LARGE,
    ),
    _fault(
        "vit-rope-in-reading-order",
        _ATTENTION,
        "the ViT's RoPE counts patches in reading order",
        lambda target: wrapped(vit, "patch_positions", _in_reading_order),
        "The ViT's rotary positions count patches line by line, although the four of a token follow each other.",
    ),
    _fault(
        "vit-qkv-head-by-head",
        _ATTENTION,
        "qkv is split head by head",
        method(VisionAttention, "__call__", _head_by_head),
        "Queries, keys and values are taken from the fused projection head by head.",
    ),
]
