"""What is known of each component of Lance at a tap: its kind, its inputs and what it is made of."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from parity.hypotheses.base import DoesNotApply
from parity.lance.components import (
    attention,
    convolutions,
    embedded,
    pictures,
    rows,
    sampling,
    sequence,
    visuals,
)
from parity.lance.components.axes import axes_of
from parity.lance.components.base import Known
from parity.laws import ANY_KIND, Component

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

_READ: WeakKeyDictionary["TapProbe", Component] = WeakKeyDictionary()
KNOWN: Sequence[Known] = (
    *attention.KNOWN,
    *convolutions.KNOWN,
    *pictures.KNOWN,
    *sampling.KNOWN,
    *sequence.KNOWN,
    *visuals.KNOWN,
    *embedded.KNOWN,
    *rows.KNOWN,
)


def component_of(site: "TapProbe", own: np.ndarray) -> Component:
    """A site's component of which the reference computes `own`."""
    if site not in _READ:
        _READ[site] = _read(site)
    return replace(_READ[site], own=own)


def _read(site: "TapProbe") -> Component:
    rounding = float(np.linalg.norm(site.expected.astype(np.float64))) * site.floor
    # Where no more is known, the result alone is.
    kind, inputs, facts = ANY_KIND, {}, {}
    for known in KNOWN:
        if known.about(site):
            try:
                inputs, facts = known.read(site)
            except DoesNotApply:
                continue
            kind = known.kind
            break
    return Component(kind, inputs, {"rows": sequence.rows(site), **facts}, site.expected, rounding, axes_of(site))
