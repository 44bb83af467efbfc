"""Groups of weights that are quantized together: a tower's matrices of one kind in a band of layers."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lance_mlx.model.quantized import Scheme, quantizable
from parity.lance.sensitivity.budget import Option

AS_IS = 16
"""Bits of a weight that is not quantized."""
_LAYER = re.compile(r"language_model\.model\.layers\.(\d+)\.(self_attn|mlp)(_moe_gen)?\.([a-z]+)_proj(_moe_gen)?")
KINDS = ("q, k, v", "o", "gate, up", "down")
_KINDS = {letter: "q, k, v" for letter in "qkv"} | {"o": "o", "gate": "gate, up", "up": "gate, up", "down": "down"}
_OTHERS = {"language_model.model.embed_tokens": "embeddings", "language_model.lm_head": "head"}
TOWERS = ("understanding", "generation")


@dataclass(frozen=True)
class Group:
    """Modules that have one width.

    Attributes:
        tower: understanding or generation; what is of neither is called by its name.
        kind: of the matrices, empty where the tower says all.
        layers: the first and the last one, None outside of them.
        shapes: of the modules' weights, by path.
    """

    tower: str
    kind: str
    layers: tuple[int, int] | None
    shapes: Mapping[str, tuple[int, int]]

    @property
    def name(self) -> str:
        """In words, unique."""
        if self.layers is None:
            return self.tower
        first, last = self.layers
        return f"{self.tower} {self.kind} {first}" + (f"-{last}" if last > first else "")

    @property
    def weights(self) -> int:
        """How many there are."""
        return sum(rows * width for rows, width in self.shapes.values())

    def schemes(self, bits: int, group_size: int) -> dict[str, Scheme | None]:
        """How each module is quantized to a width; None for what is left as it is."""
        return {path: None if bits == AS_IS else scheme_for(width, bits, group_size)
                for path, (_, width) in self.shapes.items()}  # fmt: skip

    def size(self, bits: int, group_size: int) -> int:
        """Bytes, scales and biases included; what is not quantized in bfloat16."""
        total = 0
        for path, scheme in self.schemes(bits, group_size).items():
            rows, width = self.shapes[path]
            total += rows * width * 2 if scheme is None else rows * (width * bits // 8 + 4 * width // scheme.group_size)
        return total


def scheme_for(width: int, bits: int, group_size: int) -> Scheme | None:
    """The affine scheme of a width, with smaller groups where rows part into no others; None where into none."""
    sizes = [size for size in (group_size, 64, 32) if size <= group_size and width % size == 0]
    return Scheme(bits, sizes[0]) if sizes else None


def groups_of(model: nn.Module, bands: int, group_size: int) -> list[Group]:
    """All that can be quantized of a model, layers in so many bands of about as many each."""
    layers = model.config.num_hidden_layers
    bands = min(bands, layers)
    found: dict[tuple, dict[str, tuple[int, int]]] = {}
    for path, module in quantizable(model).items():
        rows, width = module.weight.shape
        if scheme_for(width, 8, group_size) is None:
            continue
        if match := _LAYER.fullmatch(path):
            tower = TOWERS[bool(match[3] or match[5])]
            band = int(match[1]) * bands // layers
            held = [layer for layer in range(layers) if layer * bands // layers == band]
            key = tower, _KINDS[match[4]], (held[0], held[-1])
        elif path.startswith("vit_model."):
            key = "ViT", "", None
        elif path in _OTHERS:
            key = _OTHERS[path], "", None
        else:
            # The time embedder and the projections of latents are small.
            continue
        found.setdefault(key, {})[path] = (rows, width)
    order = {"": 0} | {kind: index for index, kind in enumerate(KINDS)}
    place = {tower: index for index, tower in enumerate((*TOWERS, "embeddings", "head", "ViT"))}
    keys = sorted(found, key=lambda key: (place[key[0]], order[key[1]], key[2] or (0, 0)))
    return [Group(*key, found[key]) for key in keys]


def options_of(group: Group, widths: Sequence[int], group_size: int, costs: Mapping[int, float]) -> list[Option]:
    """What a group may be, by width, as it is last."""
    return [Option(group.size(bits, group_size), costs[bits]) for bits in (*widths, AS_IS)]


@contextmanager
def as_quantized(
    model: nn.Module, schemes: Mapping[str, Scheme | None], scales: Mapping[str, np.ndarray] = {}
) -> Iterator[None]:
    """Let modules hold for a while what their weights are once they are quantized and dequantized.

    Many rows are multiplied with the same bits as by the quantized module.

    Args:
        scales: of the input channels of modules that are quantized behind some; see requantized.
    """
    modules, before = quantizable(model), {}
    try:
        for path, scheme in schemes.items():
            if scheme is not None:
                before[path] = weight = modules[path].weight
                own = mx.array(scales[path]) if path in scales else None
                modules[path].weight = requantized(weight, scheme, own)
                mx.eval(modules[path].weight)
        yield
    finally:
        for path, weight in before.items():
            modules[path].weight = weight


def requantized(weight: mx.array, scheme: Scheme, scales: mx.array | None = None) -> mx.array:
    """A weight once it is quantized and dequantized.

    Args:
        scales: powers of two that its columns are multiplied with before, as lance_mlx.checkpoint.folding moves them
            there; they are divided by them after, in the place of what the columns are multiplied with.
    """
    if scales is None:
        return scheme.dequantize(scheme.quantize(weight), weight.dtype)
    scales = scales.astype(weight.dtype)
    return scheme.dequantize(scheme.quantize(weight * scales), weight.dtype) / scales


def recipe_json(groups: Sequence[Group], bits: Sequence[int], group_size: int) -> dict[str, Any]:
    """The recipe, as `lance-mlx convert --quant-predicate` takes it."""
    schemes = {path: scheme for group, width in zip(groups, bits, strict=True)
               for path, scheme in group.schemes(width, group_size).items()}  # fmt: skip
    used = [scheme for scheme in schemes.values() if scheme is not None]
    usual = max(used, key=used.count) if used else Scheme(8, group_size)
    return usual.to_dict() | {path: False if each is None else each.to_dict() for path, each in schemes.items()}
