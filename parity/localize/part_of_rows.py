"""Hypotheses that are true of some tokens alone, where all others are as they should be."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from parity.hypotheses import Hypothesis, unpatched
from parity.hypotheses.tap_probe import TapProbe
from parity.laws.mixture import relative
from parity.laws.segments import classes
from parity.laws.support import spans

# A token is as it should be, or as a hypothesis has it, where it is off by no more than so many roundings; with fewer
# values in each nothing is told.
BEYOND, FEWEST = 8.0, 8
TOKEN = "token"


def in_some_tokens(site: TapProbe, hypothesis: Hypothesis, array: np.ndarray) -> Iterator[Hypothesis]:
    """A hypothesis under which `array` is computed, held to the tokens in which that is what was computed.

    In words that hold for another number of tokens, the plainest first; none where some token is neither as it should
    be nor as the hypothesis has it.
    """
    own, got = unpatched(site), site.got
    component = site.known(own) if not site.exact and own.shape == array.shape == got.shape else None
    if component is None or component.axes[:1] != (TOKEN,) or len(own) < 2 or own[0].size < FEWEST:
        return
    room = BEYOND * relative(component) * np.maximum(_sizes(own), 0.1 * _sizes(own).mean())
    chosen = (_sizes(array - own) > room) & (_sizes(got - array) <= room)
    if not chosen.any() or chosen.all() or not (chosen | (_sizes(got - own) <= room)).all():
        return
    for words, size, rows in _ways(chosen, component.facts.get("rows", ())):

        def transform(site: TapProbe, array: np.ndarray, rows: Rows = rows) -> np.ndarray | None:
            made, own = hypothesis.transform(site, array), unpatched(site)
            component = site.known(own)
            which = None if component is None else rows(len(own), component.facts.get("rows", ()))
            if made is None or made.shape != own.shape or which is None:
                return None
            return np.where(which.reshape(-1, *[1] * (own.ndim - 1)), made, own)

        name = f"in {words} only: {hypothesis.name}"
        yield replace(hypothesis, name=name, transform=transform, size=hypothesis.size + size)


Rows = Callable[[int, tuple], np.ndarray | None]
"""Of a number of tokens, and of the segments that they are in, which those are."""


def _ways(chosen: np.ndarray, segments: tuple) -> Iterator[tuple[str, float, Rows]]:
    """How some tokens are told: by the parts of the sequence that they are, and by their numbers."""
    for group in classes(segments) if segments else ():
        if group.words.startswith("of ") and np.array_equal(_within(group.holds, len(chosen), segments), chosen):
            holds = group.holds
            yield group.words[3:], 1 + group.size, lambda n, found, holds=holds: _within(holds, n, found)
            break
    for span in spans(TOKEN, chosen):
        yield span.told.removesuffix(" alone"), 1 + span.size, lambda n, found, span=span: span.of(n)


def _within(holds: Callable, count: int, segments: tuple) -> np.ndarray | None:
    if not segments or segments[-1].stop != count:
        return None
    chosen = np.zeros(count, bool)
    for segment in segments:
        chosen[segment.rows] = holds(segment)
    return chosen


def _sizes(array: np.ndarray) -> np.ndarray:
    return np.linalg.norm(array.reshape(len(array), -1).astype(np.float64), axis=1)
