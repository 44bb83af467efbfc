"""Scales of input channels that a recipe moves into the weights that it quantizes, from what comes before those.

A norm's weights, or the rows of up_proj, are divided by what the columns of the matrices behind them are multiplied by.
Scales are powers of two, so that the model computes what it did, bit for bit, as long as nothing is quantized.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from lance_mlx.checkpoint.safetensors import StoredTensor, Tensors, read_header, to_bfloat16
from lance_mlx.errors import LanceError

_LAYER = re.compile(r"(language_model\.model\.layers\.\d+\.)(.+)")
FOLLOWERS = {
    source: names
    for tower in ("", "_moe_gen")
    for source, names in (
        (f"input_layernorm{tower}", tuple(f"self_attn.{kind}_proj{tower}" for kind in "qkv")),
        (f"post_attention_layernorm{tower}", (f"mlp{tower}.gate_proj", f"mlp{tower}.up_proj")),
        (f"mlp{tower}.up_proj", (f"mlp{tower}.down_proj",)),
    )
}
"""The modules of a layer that scales can be moved from, and those whose input channels are its output channels. What
o_proj is given comes from the values of both towers, which have no scales in common."""
_LARGEST = 2.0**16


def followers(source: str) -> tuple[str, ...]:
    """The modules whose input channels a module's output channels are; empty for one that cannot give any scales."""
    match = _LAYER.fullmatch(source)
    return tuple(match[1] + name for name in FOLLOWERS.get(match[2], ())) if match else ()


@dataclass(frozen=True, eq=False)
class ScaledTensor(StoredTensor):
    """A tensor whose rows, and whose columns where it is a matrix, are multiplied by powers of two.

    Attributes:
        rows, columns: float32, one factor for each; None for ones.
    """

    rows: np.ndarray | None = None
    columns: np.ndarray | None = None

    def blocks(
        self, dtype: str, watch: Callable[[np.ndarray], None] = lambda block: None, size: int = 1 << 21
    ) -> Iterator[np.ndarray]:
        """See StoredTensor.blocks; every block is whole rows."""
        width, start = math.prod(self.shape[1:]), 0
        for block in super().blocks(dtype, watch, max(1, size // width) * width):
            half = block.dtype == np.uint16
            values = (block.astype(np.uint32) << 16).view(np.float32) if half else block
            values = values.reshape(-1, width)
            if self.rows is not None:
                values = values * self.rows[start : start + len(values), None]
            if self.columns is not None:
                values = values * self.columns
            start += len(values)
            values = values.reshape(-1)
            yield to_bfloat16(values) if half else values


def fold(tensors: Tensors, path: Path) -> Tensors:
    """All the tensors of a model, with the scales of a file in them.

    Args:
        path: a safetensors file of float32 vectors, each named like the module that is divided by it.

    Raises:
        LanceError: it cannot be read, holds anything else, or does not fit the model.
    """
    rows: dict[str, np.ndarray] = {}
    columns: dict[str, np.ndarray] = {}
    for source, stored in read_header(path).items():
        if not followers(source) or f"{source}.weight" not in tensors:
            raise LanceError(f"{path}: '{source}' is no module of this checkpoint whose scales can be moved")
        scales = stored.values("float32")
        if stored.shape != tensors[f"{source}.weight"].shape[:1]:
            expected = tensors[f"{source}.weight"].shape[0]
            raise LanceError(f"{path}: '{source}' has shape {list(stored.shape)}, expected [{expected}]")
        if not (np.frexp(scales)[0] == 0.5).all() or not (1 / _LARGEST <= scales.min() <= scales.max() <= _LARGEST):
            raise LanceError(f"{path}: '{source}' must hold powers of two, between {1 / _LARGEST:g} and {_LARGEST:g}")
        rows[f"{source}.weight"] = 1 / scales
        columns |= {f"{name}.weight": scales for name in followers(source)}
    return tensors | {name: _scaled(tensors[name], rows.get(name), columns.get(name)) for name in rows | columns}


def _scaled(tensor: StoredTensor, rows: np.ndarray | None, columns: np.ndarray | None) -> ScaledTensor:
    own = {field.name: getattr(tensor, field.name) for field in fields(StoredTensor)}
    return ScaledTensor(**own, rows=rows, columns=columns)
