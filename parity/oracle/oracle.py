"""The oracle of a bundle: what upstream computed, and finer taps of the reference computed from it."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from parity.bundle.reading import Bundle
from parity.errors import ParityError, one_line
from parity.model import definition
from parity.oracle.trusted import Trusted
from parity.tensors.recording import ExactInputs, Recording

UPSTREAM, REFERENCE = "upstream", "reference"
"""Whose value a tap is compared with: the bundle's own, or the reference's where the bundle has none."""
LOCAL, SEGMENT, FREE = KINDS = ("local", "segment", "free")
"""How variants are run: from the oracle's values, from upstream's own taps, and from the run's own values."""


@dataclass(frozen=True, eq=False)
class Oracle:
    """What every part of a run must compute from what the parts before it should have computed.

    Attributes:
        run: the reference with the bundle's request, in the bundle's numerics.
        taps: by name, in order of execution: upstream's values, and the reference's where the bundle has none.
        own: what the reference itself makes of the values before each tap: upstream's, and its own where the bundle
            has none; a port's run from the same values is held against these.
        passes: the taps as the reference's own passes have them; in the full-sequence entry a pass holds all tokens.
    """

    bundle: Bundle
    run: Trusted
    taps: Recording
    own: Recording
    passes: Recording

    @classmethod
    def of(cls, bundle: Bundle) -> "Oracle":
        """Run the reference from the bundle's taps; raises ParityError when it cannot run the bundle, or has
        another checkpoint than its own."""
        definition().require_checkpoint(bundle)
        with one_line(f"reference cannot run bundle {bundle.name}"):
            run = definition().load_trusted(bundle)
            passes = definition().run_passes(run, bundle.taps)
            own = definition().cut(run, passes)
        taps = {name: bundle.taps.get(name, tap) for name, tap in own.items()}
        lost = sorted(set(bundle.expected) - set(taps))
        if lost:
            raise ParityError(f"bundle {bundle.name} holds {lost[0]}, which the reference does not compute")
        return cls(bundle, run, taps, own, {name: bundle.taps.get(name, tap) for name, tap in passes.items()})

    @property
    def layout(self) -> Any:
        """The request's sequence as the reference lays it out."""
        return self.run.layout

    def source(self, name: str) -> str:
        """Whose value a tap is: upstream or reference."""
        return UPSTREAM if name in self.bundle.expected else REFERENCE

    @cached_property
    def wider(self) -> "Oracle":
        """The same with all that is computed left in float32, of the weights and taps that the policy rounds."""
        passes = {
            n: replace(tap, dtype="float32") if tap.dtype == "bfloat16" else tap for n, tap in self.passes.items()
        }
        return replace(self, run=definition().load_wider(self.bundle, "float32"), passes=passes)

    @cached_property
    def exact(self) -> ExactInputs:
        """What must be equal before any activation means anything; raises ParityError where the reference differs."""
        arrays = self.layout.arrays()
        for name in definition().SEQUENCE:
            if not np.array_equal(arrays[name], self.bundle.inputs[name].array):
                raise ParityError(f"the reference lays bundle {self.bundle.name} out with other {name}: it is no judge")
        return definition().exact_of(self.run)
