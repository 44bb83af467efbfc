"""Faults of the ViT's patches, blocks and merger."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lance_mlx.model import vit, windows
from lance_mlx.model.vit import GELU, PatchMerger, PatchProjection, VisionBlock, VisionTransformer
from lance_mlx.model.windows import Grid
from parity.bundle.reading import Bundle
from parity.lance.faults.base import (
    FLOAT32,
    LOOKS,
    Need,
    Patch,
    Target,
    calls,
    explained,
    function,
    method,
    wrapped,
)
from parity.lance.faults.layers import gelu_gate, mlp


def grids_of(bundle: Bundle) -> list[list[int]]:
    """(t, h, w) in patches of what the ViT sees, four patches a token."""
    grids = bundle.inputs.get("vit_video_grid_thw")
    return [] if grids is None else grids.array.tolist()


ROWS_OF_TOKENS = Need(
    "a picture of more than one row and column of ViT tokens",
    lambda bundle: any(min(h, w) > 2 for _, h, w in grids_of(bundle)),
)


WINDOWS = Need(
    "a picture of more than one window, more than 112 pixels wide or high",
    lambda bundle: any(max(h, w) > 8 for _, h, w in grids_of(bundle)),
)


def _projects(order: Callable[[mx.array], mx.array]) -> Patch:
    """Lay the values of a patch, [n, channels, frames, rows, columns], out in another order."""

    def project(original: Callable, module: PatchProjection, patches: mx.array) -> mx.array:
        values = patches.reshape(-1, *module["weight"].shape[1:])
        return original(module, order(values).flatten(1))

    return method(PatchProjection, "__call__", project)


def _merge_columns_first(original: Callable, module: PatchMerger, x: mx.array) -> mx.array:
    x = module.ln_q(x)
    unit = module._width // x.shape[-1]
    side = round(unit**0.5)
    x = x.reshape(-1, side, side, x.shape[-1]).swapaxes(1, 2).reshape(-1, module._width)
    for layer in module.mlp:
        x = layer(x)
    return x


def _turned(rows: mx.array, grids: Sequence[Grid], unit: int) -> mx.array:
    """Rows of tokens, `unit` a token, put column by column within every temporal slice."""
    tokens = rows.reshape(-1, unit, rows.shape[-1])
    pieces, start = [], 0
    for t, h, w in grids:
        piece = tokens[start : start + t * h * w]
        start += t * h * w
        pieces.append(piece.reshape(t, h, w, unit, -1).swapaxes(1, 2).reshape(t * h * w, unit, -1))
    return mx.concatenate(pieces).reshape(rows.shape)


def _in_tokens(grids: Sequence[Grid], merge: int) -> list[Grid]:
    return [(t, h // merge, w // merge) for t, h, w in grids]


@contextmanager
def _blocks_column_by_column(target: Target) -> Iterator[None]:
    """Hand the blocks the tokens in another order than the one that rotations and windows are made for."""
    grids: list[Grid] = []

    def look(original: Callable, model: VisionTransformer, patches: mx.array, given: Sequence[Grid]) -> mx.array:
        grids[:] = given
        return original(model, patches, given)

    def first(original: Callable, block: VisionBlock, x: mx.array, *rest: object) -> mx.array:
        merge = target.vit_model.config.spatial_merge_size
        return original(block, _turned(x, _in_tokens(grids, merge), merge**2), *rest)

    with wrapped(VisionTransformer, "__call__", look), calls(VisionBlock, first, "vit_model.blocks.0")(target):
        yield


def _output_column_by_column(
    original: Callable, model: VisionTransformer, patches: mx.array, grids: Sequence[Grid]
) -> mx.array:
    return _turned(original(model, patches, grids), _in_tokens(grids, model.config.spatial_merge_size), 1)


def _reading_order(original: Callable, coordinates: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    order, lengths = original(coordinates, side)
    return np.arange(len(order), dtype=order.dtype), lengths


def _gelu(approximate: Callable[[mx.array], mx.array]) -> Patch:
    def call(original: Callable, module: GELU, x: mx.array) -> mx.array:
        return approximate(x.astype(mx.float32)).astype(x.dtype)

    return method(GELU, "__call__", call)


_fault = partial(explained, tasks=LOOKS)

FAULTS = [
    _fault(
        "vit-patches-frame-first",
        "vit_model.patch_embed*",
        "patches are laid out frame, channel",
        _projects(lambda x: x.reshape(len(x), x.shape[2], x.shape[1], *x.shape[3:]).swapaxes(1, 2)),
        "The values of a patch are taken to be in the order frame, channel, row, column.",
    ),
    _fault(
        "vit-patches-channels-last",
        "vit_model.patch_embed*",
        "patches are laid out channels last",
        _projects(lambda x: mx.moveaxis(x.reshape(len(x), *x.shape[2:], x.shape[1]), -1, 1)),
        "The values of a patch are taken to be in the order frame, row, column, channel.",
    ),
    _fault(
        "vit-merge-columns-first",
        "vit_model.merger.mlp.0",
        "the patches of a token are merged column by column",
        method(PatchMerger, "__call__", _merge_columns_first),
        "The four patches of a token are put side by side column by column.",
    ),
    _fault(
        "vit-blocks-column-by-column",
        "vit_model.blocks.*.norm1",
        "the blocks get the tokens column by column",
        _blocks_column_by_column,
        "The blocks are given the tokens of a window column by column, but rotations and windows row by row.",
        needs=ROWS_OF_TOKENS,
    ),
    _fault(
        "vit-without-window-order",
        "vit_model.blocks.*.norm1",
        "the blocks get the tokens in reading order",
        function(windows, "window_order", _reading_order),
        "Tokens keep their reading order in the blocks, where the rows of a window are then not its tokens.",
        needs=WINDOWS,
    ),
    _fault(
        "vit-output-in-window-order",
        "vit_model.merger",
        "the output stays in window order",
        lambda target: wrapped(vit, "inverse_order", lambda original, order: np.arange(len(order))),
        "The tokens leave the ViT in window order instead of being put back into reading order.",
        needs=WINDOWS,
    ),
    _fault(
        "vit-output-column-by-column",
        "vit_model.merger",
        "the output goes column by column",
        method(VisionTransformer, "__call__", _output_column_by_column),
        "The tokens leave the ViT column by column.",
        needs=ROWS_OF_TOKENS,
    ),
    _fault(
        "vit-gelu-tanh",
        "vit_model.merger.mlp.*",
        "the GELU is the tanh approximation",
        _gelu(nn.gelu_approx),
        "The merger's GELU is the tanh approximation.",
        dtypes=FLOAT32,
    ),
    _fault(
        "vit-gelu-quick",
        "vit_model.merger.mlp.*",
        "the GELU is x * sigmoid(1.702 x)",
        _gelu(lambda x: x * mx.sigmoid(1.702 * x)),
        "The merger's GELU is x * sigmoid(1.702 x).",
    ),
    _fault(
        "vit-mlp-gelu",
        "vit_model.blocks.*.mlp.down_proj",
        "GELU instead of SiLU",
        mlp(gelu_gate, "vit_model.blocks.*.mlp"),
        "The gate of the ViT's MLPs is a GELU instead of a SiLU.",
    ),
]
