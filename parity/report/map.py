"""Where every tap of a localization lies on the map: a panel of the model, a layer, a kind of tap within it."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from parity.errors import ParityError
from parity.localize.findings import Localization
from parity.model import definition
from parity.tensors.names import parse

WHOLE = "whole"


def _plain(kind: str) -> tuple[str, str]:
    return kind, kind


@dataclass(frozen=True)
class Part:
    """A part of the model that has a panel of its own.

    Attributes:
        pattern: matches its components, with a group for the row and one for the kind of tap within it.
        row: by what rows are sorted.
        short: what a row is called.
        kind: by what kinds are sorted, those alike as they come.
        heading: of a kind's column, and what it means.
    """

    name: str
    pattern: re.Pattern[str]
    row: Callable[[str], tuple]
    short: Callable[[str], str] = str
    kind: Callable[[str], tuple] = lambda kind: (1,)
    heading: Callable[[str], tuple[str, str]] = _plain


@dataclass
class Panel:
    """A part of the model: rows are its layers, columns the kinds of taps within one, as (heading, what it means)."""

    name: str
    rows: list[str] = field(default_factory=list)
    columns: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Map:
    """The panels that have taps, the components around the layers, and where each component lies.

    `places` maps a component to (panel, row, column), or (-1, n, 0) for the n-th of `around`.
    """

    panels: list[Panel]
    around: list[str]
    places: dict[str, tuple[int, int, int]]


def lay_out(localization: Localization) -> Map:
    """Return the map of all components that a localization has taps, exact comparisons or findings of."""
    exact = (component_of(name) for name in localization.exact if not name.startswith("weights/"))
    found = [finding.component for finding in localization.findings]
    components = dict.fromkeys([*(c for c in exact if c), *(t.tap.component for t in localization.taps), *found])
    split = {component: place for component in components if (place := _split(component))}
    panels, places = [], {}
    for part in definition().PARTS:
        inside = {component: place[1:] for component, place in split.items() if place[0] == part.name}
        if not inside:
            continue
        rows = sorted(dict.fromkeys(row for row, _ in inside.values()), key=part.row)
        # The whole of a row is its last kind.
        kinds = sorted(dict.fromkeys(kind for _, kind in inside.values()), key=lambda k: part.kind(k) if k else (2,))
        for component, (row, kind) in inside.items():
            places[component] = (len(panels), rows.index(row), kinds.index(kind))
        headings = [part.heading(kind) if kind else (WHOLE, "the output of the whole layer") for kind in kinds]
        panels.append(Panel(part.name, [part.short(row) for row in rows], headings))
    around = [component for component in components if component not in split]
    places |= {component: (-1, index, 0) for index, component in enumerate(around)}
    return Map(panels, around, places)


@cache
def component_of(name: str) -> str | None:
    """Return the component of a tap name, None for a name that no table describes."""
    try:
        return parse(name).component
    except ParityError:
        return None


def shade(ratio: float | None, wrong: bool) -> str:
    """Return the step of the colour scale: right or wrong, then by decades of error over floor; "none" unmeasured."""
    if wrong:
        # A wrong tap without a ratio has no floor to be measured by: shape, dtype or NaN.
        value = math.inf if ratio is None or math.isnan(ratio) else ratio
        return "wi" if math.isinf(value) else f"w{min(max(math.ceil(math.log10(max(value, 1.0))), 1), 5)}"
    if ratio is None or math.isnan(ratio):
        return "none"
    return "r0" if ratio <= 0.3 else "r1" if ratio <= 1 else "r2"


def _split(component: str) -> tuple[str, str, str] | None:
    for part in definition().PARTS:
        match = part.pattern.fullmatch(component)
        if match:
            return part.name, match[1], match[2] or ""
    return None
