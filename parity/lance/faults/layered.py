"""A fault at one layer: while that layer runs, and with its own place for the one that the fault is written for."""

import re
from contextlib import AbstractContextManager

import mlx.nn as nn

from parity.errors import ParityError
from parity.lance.faults.base import Fault, Target
from parity.lance.faults.loading import load_fault

WRITTEN_FOR = 1
"""The layer that the catalogue's faults of a single weight name."""
_LAYER = re.compile(r"layers\.(\d+|\*)(?=\.|$)")


class LayerTarget(Target):
    """The loaded model as a fault of one layer sees it: numbered so that this layer is WRITTEN_FOR."""

    def __init__(self, target: Target, layer: int) -> None:
        super().__init__(target.pipeline)
        self._layer = layer

    def modules(self, *patterns: str) -> dict[str, nn.Module]:
        """See Target.modules; a pattern for all layers is one for this layer."""
        found: dict[str, nn.Module] = {}
        for pattern in patterns:
            inside = super().modules(_LAYER.sub(self._there, pattern))
            found |= {_LAYER.sub(self._back, name): module for name, module in inside.items()}
        return found

    def _there(self, match: re.Match[str]) -> str:
        return f"layers.{self._layer + (0 if match[1] == '*' else int(match[1]) - WRITTEN_FOR)}"

    def _back(self, match: re.Match[str]) -> str:
        return f"layers.{int(match[1]) - self._layer + WRITTEN_FOR}"


def load_layered(spec: str) -> tuple[Fault, int | None]:
    """The fault of NAME or FILE.py:NAME, and the layer of NAME@LAYER; raises ParityError as `load_fault`."""
    name, at, layer = spec.rpartition("@")
    if not at:
        return load_fault(spec), None
    if not layer.isdecimal():
        raise ParityError(f"fault {spec!r}: {layer!r} is no layer: write {name}@LAYER with its number, from 0")
    return load_fault(name), int(layer)


def at_layer(fault: Fault, target: Target, layer: int) -> AbstractContextManager[object]:
    """Apply a fault at one layer; what is to run inside is that layer alone."""
    return fault.patch(LayerTarget(target, layer))
