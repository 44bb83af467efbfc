"""Laws of guidance: the scale at which two velocities are mixed, and the factor that the mixture is scaled back by."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.mixture import Where, comparable, enough, grain, put, rounded_as, seen
from parity.laws.numbers import plainest
from parity.laws.renorm import GROUPS, Renorm, renorms
from parity.laws.sampling import sum_of_parts
from parity.laws.support import spans


def guidance(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Inputs cond, uncond [n, c], None where guidance does not act; facts scale, renorm, minimum, t, step, steps.

    Own is (uncond + scale (cond - uncond)) times the renorm's factor.
    """
    if not comparable(component, got):
        return
    cond, uncond = (component.inputs.get(name) for name in ("cond", "uncond"))
    if cond is None or uncond is None or cond.shape != got.shape or uncond.shape != got.shape or got.ndim != 2:
        yield from sum_of_parts(component, got)
        return
    given = component, got.astype(np.float64), cond.astype(np.float64), uncond.astype(np.float64)
    yield from _otherwise(*given)
    yield from _scaled(*given)
    yield from sum_of_parts(component, got)


def _otherwise(component: Component, got: np.ndarray, cond: np.ndarray, uncond: np.ndarray) -> Iterator[Law]:
    """Two velocities mixed in another way than by a scale alone."""
    right = _right(component)
    for words, mix in MIXTURES.items():
        mixed = mix(cond, uncond, component.facts["scale"])
        for axes in GROUPS.values():
            for renorm in renorms(right, cond, uncond, mixed, got, axes, grain(component.own)):
                law = _mixture(right, renorm, mix, words, 1)
                if law is not None and enough(component, got, law.apply(component)):
                    yield law


def _scaled(component: Component, got: np.ndarray, cond: np.ndarray, uncond: np.ndarray) -> Iterator[Law]:
    right = _right(component)
    laws: dict[str, Law] = {}
    for axes in ((0, 1), (1,), (0,)):
        if (share := _shares(cond, uncond, got, axes, component)) is None:
            continue
        a, b, off = share
        factor = a + b
        with np.errstate(all="ignore"):
            scale = np.where(np.abs(factor) > 1e-6, a / factor, np.nan)
        for where, value, words in _scales(component, scale, off, axes):
            mixed = _mixed(cond, uncond, component.facts["scale"], value, where, component)
            if mixed is None:
                continue
            for renorm in renorms(right, cond, uncond, mixed, got, axes, grain(component.own)):
                law = _law(right, renorm, where, value, words, 1.5 if words in SCALES else 1)
                if law is not None and law.sentence not in laws and enough(component, got, law.apply(component)):
                    laws[law.sentence] = law
        if laws:
            break
    yield from sorted(laws.values(), key=lambda law: law.size)[:12]


def _right(component: Component) -> Renorm:
    return Renorm(component.facts["renorm"], low=component.facts["minimum"])


def _shares(
    cond: np.ndarray, uncond: np.ndarray, got: np.ndarray, axes: tuple[int, ...], component: Component
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """How much of each velocity was taken, over some axes, and how far off their quotient may be; None where what was
    computed is no such sum."""
    dot = lambda x, y: np.sum(x * y, axes, keepdims=True)  # noqa: E731
    cc, cu, uu = dot(cond, cond), dot(cond, uncond), dot(uncond, uncond)
    cg, ug = dot(cond, got), dot(uncond, got)
    det = cc * uu - cu * cu
    if np.any(det <= 1e-12 * cc * uu) or np.prod([got.shape[axis] for axis in axes]) < 8:
        return None
    a, b = (uu * cg - cu * ug) / det, (cc * ug - cu * cg) / det
    left = np.linalg.norm(got - a * cond - b * uncond)
    norm, fine = float(np.linalg.norm(got)), grain(component.own)
    if left > max(1.5 * component.rounding, 6 * fine * norm, 1e-3 * norm):
        return None
    apart = np.sqrt(np.maximum(dot(cond - uncond, cond - uncond), 1e-30))
    count = np.sqrt(a.size)
    return a, b, 3 * max(component.rounding, 1e-6 * norm, fine * norm) / count / apart


Value = Callable[[Component], float]


def _scales(
    component: Component, scale: np.ndarray, off: np.ndarray, axes: tuple[int, ...]
) -> Iterator[tuple[Where, Value | None, str]]:
    """What the scale may be said to be, where: nothing where it is what it should be."""
    right = float(component.facts["scale"])
    flat, off = scale.ravel(), off.ravel()
    if not np.isfinite(flat).all():
        return
    wrong = np.abs(flat - right) > np.maximum(off, 1e-4 * abs(right))
    if not wrong.any():
        yield Where(), None, ""
        return
    where = Where()
    if not wrong.all():
        found = _part(component, wrong, 1 - axes[0]) if len(axes) == 1 else None
        if found is None:
            return
        where = found
    value, near = float(np.median(flat[wrong])), float(np.median(off[wrong]))
    if np.abs(flat[wrong] - value).max() > 3 * off[wrong].max():
        return
    plain, said = plainest(value, near)
    yield where, lambda other: plain, f"the guidance scale is {said}"
    for words, change in SCALES.items():
        if abs(change(right, component.facts) - value) <= near and change(right, component.facts) != right:
            yield where, lambda other, change=change: change(other.facts["scale"], other.facts), words


def _part(component: Component, wrong: np.ndarray, axis: int) -> Where | None:
    """The rows or channels, of booleans along one axis, in words; None where there are no short ones."""
    ways = seen(component)
    if axis == 0 and len(ways) > 1 and ways[1][0][0] > 1:
        frames = wrong.reshape(ways[1][0][0], -1)
        if (frames == frames[:, :1]).all():
            return Where(tuple(spans("frame", frames[:, 0])[:1]), ways[1][1], True)
    names = ways[0][1]
    found = spans(names[axis], wrong)
    return Where((found[0],), names) if found and found[0].size <= 3 else None


def _progress(facts) -> float:
    return facts["step"] / max(facts["steps"], 1)


def _end(facts) -> float:
    return facts["step"] / max(facts["steps"] - 1, 1)


SCALES: dict[str, Callable[[float, dict], float]] = {
    "the guidance scale is one larger": lambda s, f: s + 1,
    "the guidance scale is one smaller": lambda s, f: s - 1,
    "the guidance scale falls with t, from the scale to 1": lambda s, f: 1 + (s - 1) * f["t"],
    "the guidance scale falls with t, from the scale to 0": lambda s, f: s * f["t"],
    "the guidance scale rises as t falls, from 1 to the scale": lambda s, f: 1 + (s - 1) * (1 - f["t"]),
    "the guidance scale rises as t falls, from 0 to the scale": lambda s, f: s * (1 - f["t"]),
    "the guidance scale falls from step to step, to 1 behind the last": lambda s, f: s + (1 - s) * _progress(f),
    "the guidance scale falls from step to step, to 1 in the last": lambda s, f: s + (1 - s) * _end(f),
    "the guidance scale falls from step to step, to 0 behind the last": lambda s, f: s * (1 - _progress(f)),
    "the guidance scale falls from step to step, to 0 in the last": lambda s, f: s * (1 - _end(f)),
    "the guidance scale rises from step to step, from 1 to the scale": lambda s, f: 1 + (s - 1) * _end(f),
    "the guidance scale follows a half cosine from the scale to 1": lambda s, f: (
        1 + (s - 1) * (1 + np.cos(np.pi * _end(f))) / 2),
}  # fmt: skip


def _along(x: np.ndarray, y: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """How much of y is in x."""
    return np.sum(x * y, axes, keepdims=True) / np.maximum(np.sum(y * y, axes, keepdims=True), 1e-30)


def _mixtures() -> Iterator[tuple[str, Callable[..., np.ndarray]]]:
    for over, axes in GROUPS.items():
        by = "" if over == "global" else f", {over}"

        def across(cond: np.ndarray, uncond: np.ndarray, scale: float, *_: object, axes: tuple = axes) -> np.ndarray:
            step = cond - uncond
            return cond + (scale - 1) * (step - _along(step, cond, axes) * cond)

        def nearest(cond: np.ndarray, uncond: np.ndarray, scale: float, *_: object, axes: tuple = axes) -> np.ndarray:
            uncond = _along(cond, uncond, axes) * uncond
            return uncond + scale * (cond - uncond)

        yield f"guidance leaves out what lies along the conditional velocity{by}", across
        yield f"the unconditional velocity is scaled to be nearest to the conditional one{by}", nearest


MIXTURES = dict(_mixtures())


def _mixed(
    cond: np.ndarray, uncond: np.ndarray, right: float, value: Value | None, where: Where, component: Component
) -> np.ndarray | None:
    """The guided velocity before any renorm."""
    scale: float | np.ndarray = right
    if value is not None:
        chosen = where.mask(component)
        if chosen is None:
            return None
        scale = np.where(chosen, value(component), right)
    rounded = partial(rounded_as, component.own)
    return rounded(uncond + rounded(scale * rounded(cond - uncond)))


def _law(right: Renorm, renorm: Renorm, where: Where, value: Value | None, words: str, numbers: float) -> Law | None:
    def mix(cond: np.ndarray, uncond: np.ndarray, scale: float, other: Component) -> np.ndarray | None:
        return _mixed(cond, uncond, scale, value, where, other)

    # What is said without a number is read from less than a factor is.
    size = 0 if value is None else numbers + where.size
    return _mixture(right, renorm, mix, where.says(words) if words else "", size)


def _mixture(
    right: Renorm, renorm: Renorm, mix: Callable[..., np.ndarray | None], words: str, size: float
) -> Law | None:
    said, more = renorm.against(right)
    if not words and not said:
        return None

    def apply(other: Component) -> np.ndarray | None:
        cond, uncond = (other.inputs.get(name) for name in ("cond", "uncond"))
        if cond is None or uncond is None:
            return None
        cond, uncond = cond.astype(np.float64), uncond.astype(np.float64)
        mixed = mix(cond, uncond, other.facts["scale"], other)
        if mixed is None:
            return None
        return put(
            other.own, np.ones(1, bool), mixed * renorm.factor(cond, uncond, mixed, partial(rounded_as, other.own))
        )

    return Law(" and ".join(filter(None, [words, said])), 0.9 * more + size, apply)
