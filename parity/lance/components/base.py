"""How a kind of component is known: by what it is called, and by what reads its inputs and parts from the reference."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from parity.hypotheses.base import DoesNotApply, recomputed
from parity.lance.hypotheses.tools import module_of
from parity.model import definition
from parity.tensors.recording import Tap

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

Read = Callable[["TapProbe"], tuple[dict[str, np.ndarray], dict[str, Any]]]
"""The inputs and the facts of a site's component; raises DoesNotApply where it is of another kind."""


@dataclass(frozen=True)
class Known:
    """A kind of component, the patterns (fnmatch) of the components that are of it, and what reads them.

    `weights` says whether the taps are parameters and not what is computed with them.
    """

    kind: str
    components: tuple[str, ...]
    read: Read
    weights: bool = False

    def about(self, site: "TapProbe") -> bool:
        """Whether a site is of this kind."""
        if site.tap.name.startswith("weights/") is not self.weights:
            return False
        return any(fnmatchcase(site.component, pattern) for pattern in self.components)


def called_with(site: "TapProbe") -> tuple[nn.Module, list[np.ndarray | None]]:
    """A site's own module, and what it is given when the site is computed: its arrays, None for anything else.

    In the full-sequence entry an input with a row for each row of the result is cut to the rows of the site's call.
    """
    module, given = given_to(site)
    return module, [own_rows(site, array) for array in given]


def given_to(site: "TapProbe") -> tuple[nn.Module, list[np.ndarray | None]]:
    """As `called_with`, but with all rows of the pass."""
    module, calls = module_of(site), []

    def keep(module: nn.Module, args: tuple) -> None:
        calls.append(args)

    handle = module.register_forward_pre_hook(keep)
    try:
        recomputed(site)
    finally:
        handle.remove()
    if not calls:
        raise DoesNotApply
    return module, [array_of(value) for value in calls[-1]]


def array_of(value: object) -> np.ndarray | None:
    """A tensor as float32, int32 or bool; None for what is none."""
    if not isinstance(value, Tensor):
        return None
    value = value.detach().cpu()
    if value.is_floating_point():
        return value.float().numpy()
    return value.numpy() if value.dtype is torch.bool else value.to(torch.int32).numpy()


def own_rows(site: "TapProbe", array: np.ndarray | None) -> np.ndarray | None:
    """Of an array of a whole pass the rows of the site's call; as it is where it has none of the pass."""
    if array is None or site.entry != "full_sequence" or array.ndim == 0 or len(array) == len(site.expected):
        return array
    name, rows = site.native, Tap(np.arange(len(array), dtype=np.int32), "int32")
    pieces = definition().cut(site.oracle.run, {name: rows}) if "/" in name else {}
    return array[pieces[site.tap.name].array] if site.tap.name in pieces else array


def parameter(module: nn.Module, name: str) -> np.ndarray | None:
    """A module's parameter as float32; None where it has none."""
    value = getattr(module, name, None)
    return None if value is None else array_of(value)
