"""Low-rank adapters (LoRA) of linear layers: a layer with one gives y + scale * (x @ lora_a) @ lora_b."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lance_mlx.backend.numerics import BFLOAT16
from lance_mlx.checkpoint.packing import Added
from lance_mlx.checkpoint.streaming import StreamedLayers
from lance_mlx.checkpoint.tensors import VIT, Checkpoint, ViTSource
from lance_mlx.checkpoint.weights import inspect_lance
from lance_mlx.errors import LanceError
from lance_mlx.model.lance import Lance
from lance_mlx.model.layers import Linear
from lance_mlx.model.quantized import QuantizedLinear

_VIT = VIT.rstrip(".")
_LAYERS = "language_model.model.layers."
_GENERATION = "_moe_gen"
_TOWERS = ("generation", "understanding", "both")
_MOST_RANK = 4096


class Pair(NamedTuple):
    """The adapter of one layer: lora_a [in, rank] and lora_b [rank, out], float32, and what their product is scaled
    by."""

    a: mx.array
    b: mx.array
    scale: float

    def delta(self) -> mx.array:
        """What it adds to the layer's weight, float32 [out, in]."""
        return self.scale * (self.a @ self.b).T


@dataclass(frozen=True, eq=False)
class Adapter:
    """The adapters of a model's layers, by the layers' paths.

    Attributes:
        name: the folder that they were read from.
        strength: how many times as strong as in there they are.
    """

    name: str
    pairs: Mapping[str, Pair]
    strength: float = 1.0

    @property
    def digest(self) -> str:
        """A checksum of its values."""
        found = hashlib.sha256()
        for path, pair in self.pairs.items():
            found.update(path.encode() + np.array(pair.a).tobytes() + np.array(pair.b).tobytes())
        return found.hexdigest()

    def scaled(self, factor: float) -> "Adapter":
        """The same, so many times as strong."""
        pairs = {path: pair._replace(scale=pair.scale * factor) for path, pair in self.pairs.items()}
        return Adapter(self.name, pairs, self.strength * factor)


@dataclass(frozen=True)
class LoRASettings:
    """Which layers are given an adapter, and of what size.

    Attributes:
        rank: of each.
        alpha: their products are scaled by alpha / rank.
        tower: whose attention and MLP: "generation", "understanding" or "both".
        targets: patterns on the layers' paths, as a shell's, in place of all of the tower's; of the last part of a path
            alone where they hold no dot, such as "q_proj*".

    Raises:
        LanceError: a value that cannot be used.
    """

    rank: int = 16
    alpha: float = 16.0
    tower: str = "generation"
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or not 1 <= self.rank <= _MOST_RANK:
            raise LanceError(f"rank {self.rank!r} must be an integer from 1 to {_MOST_RANK}")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha < 1e6:
            raise LanceError(f"alpha {self.alpha!r} must be a number above 0")
        if self.tower not in _TOWERS:
            raise LanceError(f"tower {self.tower!r} must be one of {', '.join(_TOWERS)}")

    def takes(self, path: str) -> bool:
        """Whether the layer at a path is given one."""
        if not path.startswith(_LAYERS):
            return False
        if self.tower != "both" and (_GENERATION in path) != (self.tower == "generation"):
            return False
        last = path.rpartition(".")[2]
        return not self.targets or any(fnmatchcase(path if "." in each else last, each) for each in self.targets)


def adaptable(model: Lance) -> dict[str, nn.Module]:
    """The layers of a model that may have an adapter, by path; also those whose weights are read when they run."""
    found = {path: each for path, each in model.named_modules() if isinstance(each, Linear | QuantizedLinear)}
    layers = model.language_model.model.layers
    if isinstance(layers, StreamedLayers):
        for index, layer in enumerate(layers.modules):
            own = ((path, each) for path, each in layer.named_modules() if isinstance(each, Linear | QuantizedLinear))
            found |= {f"{_LAYERS}{index}.{path}": each for path, each in own}
    return found


def new_pairs(model: Lance, settings: LoRASettings, key: mx.array) -> dict[str, Pair]:
    """Adapters that change nothing yet: lora_a is drawn evenly between -1 and 1 over the root of the width, lora_b 0.

    Raises:
        LanceError: the patterns match no layer.
    """
    layers = {path: each for path, each in sorted(adaptable(model).items()) if settings.takes(path)}
    if not layers:
        raise LanceError(f"targets {', '.join(settings.targets)} match no layer of the {settings.tower} tower")
    pairs = {}
    for (path, layer), own in zip(layers.items(), mx.random.split(key, len(layers)), strict=True):
        width, out = shape_of(layer)
        bound = width**-0.5
        a = mx.random.uniform(-bound, bound, (width, settings.rank), key=own)
        pairs[path] = Pair(a, mx.zeros((settings.rank, out)), settings.alpha / settings.rank)
    return pairs


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """Width of what a layer takes and of what it gives."""
    out, width = layer.weight.shape
    return (width * 32 // layer.scheme.bits if isinstance(layer, QuantizedLinear) else width), out


def add_adapters(model: Lance, adapters: Sequence[Adapter]) -> None:
    """Let layers use adapters; several on one layer add up, as one of their joint rank.

    Before the projections of text are joined.

    Raises:
        LanceError: an adapter is of a layer that the model has not, or of another shape.
    """
    layers, pairs = adaptable(model), {}
    for adapter in adapters:
        for path, pair in adapter.pairs.items():
            layer, other = layers.get(path), "it is of another model"
            if layer is None:
                if path.startswith(VIT) and _VIT not in model:
                    continue
                raise LanceError(f"{adapter.name}: there is no layer '{path}' that could have an adapter: {other}")
            given, wanted = (pair.a.shape[0], pair.b.shape[1]), shape_of(layer)
            if given != wanted:
                sizes = f"{given[0]} to {given[1]}, not of {wanted[0]} to {wanted[1]}"
                raise LanceError(f"{adapter.name}: the adapter of '{path}' is of a layer of {sizes}: {other}")
            pairs.setdefault(path, []).append(pair)
    for path, own in pairs.items():
        place(layers[path], own)


def place(layer: nn.Module, pairs: Sequence[Pair]) -> None:
    """Give a layer the sum of some adapters."""
    if len(pairs) == 1:
        layer.lora_a, layer.lora_b, layer.lora_scale = pairs[0]
    else:
        layer.lora_a = mx.concatenate([pair.a for pair in pairs], axis=1)
        layer.lora_b = mx.concatenate([pair.scale * pair.b for pair in pairs])
        layer.lora_scale = 1.0


def added_to(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> tuple[Added, list[str]]:
    """What adapters add to the weights of a checkpoint, for a conversion, and where it is from.

    Raises:
        LanceError: as `add_adapters`.
    """
    with_vit = any(path.startswith(VIT) for adapter in adapters for path in adapter.pairs)
    model = inspect_lance(checkpoint, with_vit, ViTSource.LANCE).build(BFLOAT16) if adapters else None
    if model is not None:
        add_adapters(model, adapters)
    found = {} if model is None else {path: pair.delta for path, pair in pairs_of(model).items()}
    return found, [f"{adapter.name} {adapter.strength:g} {adapter.digest}" for adapter in adapters]


def pairs_of(model: Lance) -> dict[str, Pair]:
    """The adapters that a model's layers have."""
    found = {path: each for path, each in adaptable(model).items() if "lora_a" in each}
    return {path: Pair(each.lora_a, each.lora_b, each.lora_scale) for path, each in sorted(found.items())}
