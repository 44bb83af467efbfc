"""What is known of each component of Lance at a tap: its kind, its inputs and what it is made of."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from parity.hypotheses.base import DoesNotApply
from parity.lance.components import rows
from parity.lance.components.base import Known
from parity.laws import Component

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

_READ: WeakKeyDictionary["TapProbe", Component | None] = WeakKeyDictionary()
KNOWN: Sequence[Known] = (*rows.KNOWN, *rows.ANYTHING)


def component_of(site: "TapProbe", own: np.ndarray) -> Component | None:
    """A site's component of which the reference computes `own`; None where nothing is known of it."""
    if site not in _READ:
        _READ[site] = _read(site)
    component = _READ[site]
    return None if component is None else replace(component, own=own)


def _read(site: "TapProbe") -> Component | None:
    for known in KNOWN:
        if known.about(site):
            try:
                inputs, facts = known.read(site)
            except DoesNotApply:
                continue
            rounding = float(np.linalg.norm(site.expected.astype(np.float64))) * site.floor
            return Component(known.kind, inputs, facts, site.expected, rounding)
    return None
