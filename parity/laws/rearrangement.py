"""Laws of results that hold the values of another in another place: patches, heads, and pictures made of patches.

Input source is what is laid out anew, facts name what that is called. A layout is told as einops writes it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import permutations, product
from math import prod
from string import ascii_lowercase

import numpy as np

from parity.laws.base import Component, Law

# Values that a layout is read from, the fewest of them for each of its numbers, and the largest result.
READ, EACH, LARGEST = 2048, 4, 1 << 22


@dataclass(frozen=True)
class Layout:
    """Which value of a source each of a result is: along each axis sizes, the outer first, and a step in the source
    for each; the first value stands at `start`."""

    sizes: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[int, ...], ...]
    start: int

    def of(self, source: np.ndarray) -> np.ndarray:
        """The result that is laid out so of a source."""
        steps = (np.arange(n) * step for n, step in zip(sum(self.sizes, ()), sum(self.steps, ()), strict=True))
        index = reduce(lambda a, b: np.add.outer(a, b), steps, np.array(self.start))
        return source.ravel()[index].reshape([prod(sizes) for sizes in self.sizes])


def layout_of(source: np.ndarray, made: np.ndarray) -> Layout | None:
    """How a result is laid out of a source of as many values; None where it is not, or too many of them are alike."""
    if source.size != made.size or not 1 < made.size <= LARGEST or made.ndim > 6:
        return None
    order = np.argsort(source, axis=None, kind="stable")
    values = source.ravel()[order]
    if not np.array_equal(values, np.sort(made, axis=None)):
        return None
    alone = np.flatnonzero((np.diff(values, prepend=np.nan) != 0) & (np.diff(values, append=np.nan) != 0))
    at = np.searchsorted(values, made.ravel())
    known = np.flatnonzero(np.isin(at, alone))
    places = np.random.default_rng(0).permutation(known)[:READ]
    for sizes in product(*(_orders(n) for n in made.shape)):
        digits = np.stack(np.unravel_index(places, [n for axis in sizes for n in axis] or [1])).T
        if len(places) < EACH * (digits.shape[1] + 1):
            return None
        design = np.concatenate([digits, np.ones((len(digits), 1))], 1)
        found = np.rint(np.linalg.lstsq(design, order[at[places]].astype(np.float64), rcond=None)[0]).astype(int)
        if not np.array_equal(design.astype(int) @ found, order[at[places]]):
            continue
        steps, rest = [], list(found[:-1])
        for axis in sizes:
            steps.append(tuple(int(rest.pop(0)) for _ in axis))
        layout = Layout(tuple(sizes), tuple(steps), int(found[-1]))
        if np.array_equal(layout.of(source), made):
            return layout
    return None


def _orders(count: int) -> list[tuple[int, ...]]:
    """The prime factors of a length in any order."""
    primes, rest, factor = [], count, 2
    while rest > 1:
        while rest % factor == 0:
            primes.append(factor)
            rest //= factor
        factor += 1
    # Of many unlike ones not all orders are tried.
    return sorted(set(permutations(primes))) if len(set(primes)) > 1 and len(primes) <= 5 else [tuple(primes)]


def read(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Another layout of the same values."""
    source = component.inputs.get("source")
    if source is None or component.own.shape != got.shape:
        return
    right, found = layout_of(source, component.own), layout_of(source, got)
    if right is None or found is None:
        return

    def apply(other: Component) -> np.ndarray | None:
        there = other.inputs.get("source")
        same = there is not None and there.shape == source.shape and other.own.shape == got.shape
        return found.of(there).astype(np.float32) if same else None

    yield Law(f"{component.facts['name']} {_said(source.shape, right, found)}", 1, apply)


def _said(shape: Sequence[int], right: Layout, found: Layout) -> str:
    steps = _steps(shape, (right, found))
    if steps:
        (there, told), (here, _) = (_pattern(shape, layout, steps) for layout in (found, right))
        words = f"'{there}'{_reversed(found)} instead of '{here}', with {told}"
    else:
        # Sizes that do not divide each other have names of their own.
        ways = [(layout, _steps(shape, (layout,))) for layout in (found, right)]
        if not all(steps for _, steps in ways):
            return "is laid out another way"
        (there, told), (here, own) = (_pattern(shape, layout, steps) for layout, steps in ways)
        words = f"'{there}', with {told},{_reversed(found)} instead of '{here}', with {own}"
    return f"is laid out as {words}"


def _reversed(layout: Layout) -> str:
    return " and in part reversed" if any(step < 0 for step in sum(layout.steps, ())) else ""


def _steps(shape: Sequence[int], layouts: Sequence[Layout]) -> list[int]:
    """The steps in a source, the largest first, that all of some layouts are made of; none where there are none."""
    edges = {1, *(prod(shape[axis:]) for axis in range(len(shape)))}
    for sizes, steps in ((s, t) for layout in layouts for s, t in zip(layout.sizes, layout.steps, strict=True)):
        for place, step in enumerate(map(abs, steps)):
            # Sizes of one axis that follow each other in the source as well are one.
            inner = place + 1 < len(sizes) and abs(steps[place + 1]) * sizes[place + 1] == step
            outer = place > 0 and abs(steps[place - 1]) == step * sizes[place]
            edges |= (set() if inner else {step}) | (set() if outer else {step * sizes[place]})
    found = sorted((step for step in edges if step < prod(shape)), reverse=True)
    nested = all(a % b == 0 for a, b in zip([prod(shape), *found], found, strict=False))
    return found if nested and len(found) <= len(ascii_lowercase) else []


def _axes(layout: Layout, steps: Sequence[int]) -> list[list[int]]:
    """Of each axis of a result the steps in the source that it is made of, the outer first."""
    axes = []
    for sizes, own in zip(layout.sizes, layout.steps, strict=True):
        axis: list[int] = []
        for size, step in zip(sizes, map(abs, own), strict=True):
            axis += [each for each in steps if step <= each < step * size]
        axes.append(axis)
    return axes


def _pattern(shape: Sequence[int], layout: Layout, steps: Sequence[int]) -> tuple[str, str]:
    """A layout as einops writes it, and the sizes of what stands in it."""
    names = dict(zip(steps, ascii_lowercase, strict=False))
    source = [[s for s in steps if prod(shape[i + 1 :]) <= s < prod(shape[i:])] for i in range(len(shape))]
    ways = []
    for axes in (source, _axes(layout, steps)):
        words = [" ".join(names[step] for step in axis) or "1" for axis in axes]
        ways.append(" ".join(f"({word})" if " " in word else word for word in words))
    sizes = (f"{names[step]}={larger // step}" for larger, step in zip([prod(shape), *steps], steps, strict=False))
    return " -> ".join(ways), ", ".join(sizes)
