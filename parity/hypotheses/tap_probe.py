"""One place of a run, on the reference's side: a tap that is wrong by itself, and the means to compute it again."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from parity.laws import Component
from parity.model import definition
from parity.oracle.oracle import Oracle
from parity.tensors.names import TapName, parse
from parity.tensors.recording import Tap
from parity.tensors.sketch import Sketch


class TapProbe:
    """What a hypothesis is handed.

    Attributes:
        oracle: all that should have been computed.
        tap: the tap, with its component, call and axes.
        expected: the oracle's value, float32 or int32; a weight is in PyTorch's layout.
        got: what the implementation computed from the oracle's input.
        floor: what rounding alone does to the tap, relative to |expected|; 0 where it may do nothing.
        allowed: the largest difference that agrees, relative to |expected|; None where the tap has no floor.
        shared: of an exact array, which values along its last axis the implementation has, as booleans; None for all.
        passed: taps before it that the implementation does not tell: they are computed on the way, not given.
        right: of an exact array, others beside it that are as they should be, and so under whatever explains it.
    """

    def __init__(
        self,
        oracle: Oracle,
        tap: TapName,
        expected: np.ndarray,
        got: np.ndarray,
        exact: Mapping[str, np.ndarray],
        floor: float = 0.0,
        passed: Sequence[str] = (),
        shared: np.ndarray | None = None,
        allowed: float | None = None,
        right: Sequence["TapProbe"] = (),
    ) -> None:
        self.oracle, self.tap, self.expected, self.got, self.floor = oracle, tap, expected, got, floor
        self.passed, self.shared, self.allowed, self.right = passed, shared, allowed, right
        self._exact = exact

    @property
    def component(self) -> str:
        """What computes the tap."""
        return self.tap.component

    @property
    def dtype(self) -> str:
        """The policy of the run: float32 or bfloat16."""
        return self.oracle.bundle.dtype

    @property
    def entry(self) -> str:
        """kv_cache or full_sequence."""
        return self.oracle.bundle.entry

    @property
    def pipeline(self) -> Any:
        """The loaded reference."""
        return self.oracle.run.pipeline

    @property
    def request(self) -> Any:
        """The request as the reference has it."""
        return self.oracle.run.request

    @property
    def layout(self) -> Any:
        """The sequence as the reference lays it out."""
        return self.oracle.layout

    @property
    def native(self) -> str:
        """The tap of the reference's own pass that holds this one."""
        return self._native(self.tap.name)

    @property
    def exact(self) -> bool:
        """Whether the tap is an integer input or a weight, which nothing computes: only transforms matter."""
        return self.tap.name.startswith(("inputs/", "weights/"))

    @property
    def wider(self) -> "TapProbe":
        """The same place where nothing on the way to it is rounded."""
        given = (self.tap, self.expected, self.got, self._exact, self.floor, self.passed, self.shared, self.allowed)
        return TapProbe(self.oracle.wider, *given)

    @cached_property
    def path(self) -> str:
        """The path of what computes the tap in the checkpoint, the VAE's without "vae."."""
        name = self.tap.name
        if name.startswith("weights/"):
            return name.removeprefix("weights/").removeprefix("vae.").rpartition(".")[0]
        if name.startswith("vit_model"):
            call, _, inner = name.partition(".")
            return f"vit_model.{inner}" if inner else "vit_model"
        return self.tap.path

    @cached_property
    def module(self) -> nn.Module | None:
        """The reference's module whose output the tap is; None for functions and integers."""
        name, path = self.tap.name, self.path
        if name.startswith(("vae.", "weights/vae.")):
            owner: Any = self.pipeline.vae
        elif path.startswith("vit_model"):
            owner, path = self.pipeline.vit_model, path.removeprefix("vit_model").removeprefix(".")
        else:
            owner = self.pipeline.model
        try:
            return owner.get_submodule(path) if path else owner
        except AttributeError:
            return None

    def known(self, own: np.ndarray) -> Component | None:
        """What is known of the component where the reference computes `own`; None where nothing is."""
        return definition().component_of(self, own)

    def judged(self, array: np.ndarray) -> np.ndarray:
        """Of an array like the tap's, what the implementation has too."""
        return array if self.shared is None else array[..., self.shared]

    def value(self, name: str) -> np.ndarray | None:
        """The oracle's value of a tap or an exact array, by its full name; None where there is none."""
        if name in self._exact:
            return self._exact[name]
        tap = self.oracle.taps.get(name)
        return None if tap is None else tap.array

    def near(self, path: str) -> np.ndarray | None:
        """The oracle's value of another tap of the same call."""
        separator = "." if self.tap.name.startswith("vit_model") else "/"
        return self.value(f"{self._call}{separator}{path}")

    def recompute(self) -> np.ndarray:
        """The tap computed anew by the reference from the oracle's values before it, under the patches of the moment.

        Raises LookupError when the reference, so patched, never comes to it.
        """
        if self.exact:
            return self.expected
        run, name, given = self.oracle.run, self._native(self.tap.name), self.oracle.passes
        if self.passed:
            passed = set(map(self._native, self.passed))
            given = {other: tap for other, tap in given.items() if other not in passed}
        array = run.recompute(name, given)
        if array is None:
            raise LookupError(f"{name} was not computed")
        if name == self.tap.name and run.entry != "full_sequence":
            return array
        pieces = definition().cut(run, {name: Tap(np.ascontiguousarray(array), _held(array))})
        if self.tap.name not in pieces:
            raise LookupError(f"{self.tap.name} is not a part of {name}")
        return pieces[self.tap.name].array

    @property
    def _call(self) -> str:
        name = self.tap.name
        return name.partition("." if name.startswith("vit_model") else "/")[0]

    def _native(self, name: str) -> str:
        """The tap of the reference's own pass that holds another."""
        if self.entry != "full_sequence" or "/" not in name:
            return name
        call, _, path = name.partition("/")
        arm, _, part = call.partition(".")
        first = {"prefix": "step0", "prefill": "decode0"}
        for kind, native in first.items():
            if part.startswith(kind):
                return f"{arm}.{native}/{path}"
        return name


def site_of(
    oracle: Oracle,
    name: str,
    got: np.ndarray,
    exact: Mapping[str, np.ndarray],
    floor: float = 0.0,
    held: Mapping[str, Tap | Sketch] | None = None,
    passed: Sequence[str] = (),
    allowed: float | None = None,
) -> TapProbe:
    """The site of a tap or an exact array; `held` is what taps were held against, where that is not the oracle's."""
    other = (held or {}).get(name)
    expected = exact[name] if name in exact else (other if isinstance(other, Tap) else oracle.taps[name]).array
    return TapProbe(oracle, parse(name), expected, got, exact, floor, passed, allowed=allowed)


def _held(array: np.ndarray) -> str:
    return "int32" if array.dtype == np.int32 else "float32"
