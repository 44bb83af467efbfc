"""Laws of what a convolution multiplies: parts of its kernel or input that count otherwise, or another kernel."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from parity.laws.base import Component, Law, Matrices
from parity.laws.convolution import Reading, chosen_places, reading_of
from parity.laws.numbers import norm_of, plainest
from parity.laws.patches import all_places, convolved, laid_out, patches, taken
from parity.laws.place import place
from parity.laws.support import spans

LEFT, LEFT_BESIDE = 0.05, 0.5
# Outputs and channels of them that are looked at, and how many pairs of input channels are tried.
PLACES, CHANNELS, PAIRS = 256, 16, 12
# A kernel is read from no fewer outputs a number than this.
ENOUGH = 1.5
Change = Callable[[Reading, Component], np.ndarray | None]
"""What a law adds to a convolution's result, as values [n, out] of all its outputs."""


@dataclass(frozen=True)
class Looked:
    """What is looked at: a residual [n, out], the patches [n, in, t, h, w] and weight [out, in, t, h, w] behind it.

    `inside` tells which of a patch's taps lie within the input, [n, t, h, w]; `bias` is [out].
    """

    residual: np.ndarray
    patches: np.ndarray
    inside: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    rounding: float


def parts(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Bias, input, border, taps or input channels of a convolution that are left out or count otherwise."""
    reading = reading_of(component)
    looked = None if reading is None else _look(component, got, reading)
    if looked is None:
        return
    for law in (*_constants(looked), *_factors(looked), *_exchanged(looked)):
        values = law.apply(component)
        if values is not None and norm_of(got - values) <= max(
            component.rounding, LEFT_BESIDE * norm_of(got.astype(np.float64) - component.own)
        ):
            yield law


def kernel(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Another kernel, where there are more outputs than numbers in it: read from some, and true of the others."""
    reading = reading_of(component)
    if reading is None or component.own.shape != got.shape or not np.isfinite(got).all():
        return
    residual = got.astype(np.float64) - component.own
    places = all_places(got.shape)
    unknown = reading.weight[0].size + 1
    if not norm_of(residual) > component.rounding or not ENOUGH * unknown < len(places) <= 8192 or unknown > 2048:
        return
    rng = np.random.default_rng(0)
    places = rng.permutation(places)[: max(4 * unknown, PLACES)]
    read = np.concatenate(
        [patches(reading.x, reading.geometry, reading.weight.shape[2:], places).reshape(len(places), -1),
         np.ones((len(places), 1))], 1)  # fmt: skip
    wanted, cut = taken(residual, places), int(len(places) * 0.8)
    # Of fewer outputs than numbers nothing is learned.
    if cut <= unknown:
        return
    change = np.linalg.lstsq(read[:cut], wanted[:cut], rcond=1e-6)[0]
    if norm_of(wanted[cut:] - read[cut:] @ change) > max(
        LEFT * norm_of(wanted[cut:]), component.rounding * np.sqrt(wanted[cut:].size / residual.size)
    ):
        return
    step, bias = change[:-1].T.reshape(reading.weight.shape), change[-1]
    plain = False
    if norm_of(bias) <= 0.05 * max(norm_of(step), norm_of(_bias(component))):
        for law in place(_as_result(reading.weight, component), reading.weight + step):
            yield _law(f"of the kernel: {law.sentence}", law.size + 1, _through(law))
            plain = True
    if not plain:
        yield _of_kernel(reading.weight, step, bias)


def _as_result(weight: np.ndarray, component: Component) -> Component:
    """A kernel as what laws of any result are read from; it is known as exactly as the outputs it is read from."""
    axes = ("output channel", "input channel", "kernel frame", "kernel row", "kernel column")
    exact = component.rounding / max(norm_of(component.own), 1e-30)
    return Component("any", {}, {}, weight, max(10 * exact, 1e-5) * norm_of(weight), axes)


def _through(law: Law) -> Change:
    """What a law of a kernel makes of the result."""

    def add(reading: Reading, other: Component) -> np.ndarray | None:
        weight = law.apply(_as_result(reading.weight, other))
        if weight is None or weight.shape != reading.weight.shape:
            return None
        return convolved(reading.x, weight - reading.weight, reading.geometry, all_places(other.own.shape))

    return add


def _of_kernel(weight: np.ndarray, step: np.ndarray, bias: np.ndarray) -> Law:
    """Another kernel of which nothing plainer is known."""
    moved = np.sqrt((step**2).sum(axis=tuple(range(1, step.ndim)))) + np.abs(bias)
    outputs = spans("output channel", moved > 1e-4 * moved.max())
    where = f" in {outputs[0].words}" if outputs else ""
    apart = norm_of(step) / max(norm_of(weight), 1e-30)
    rows = len(weight)
    figure = Matrices(
        "the kernel", "output channel", "input channel and tap",
        {"expected": weight.reshape(rows, -1), "found": (weight + step).reshape(rows, -1)},
    )  # fmt: skip

    def add(reading: Reading, other: Component) -> np.ndarray | None:
        if reading.weight.shape != step.shape:
            return None
        return convolved(reading.x, step, reading.geometry, all_places(other.own.shape)) + bias

    words = f"the kernel is another{where}: {apart:.3g} of its norm away"
    return replace(_law(words, float(moved.size), add, figure), describes=True)


def _look(component: Component, got: np.ndarray, reading: Reading) -> Looked | None:
    own = component.own
    if own.shape != got.shape or not np.isfinite(got).all():
        return None
    residual = got.astype(np.float64) - own
    if norm_of(residual) <= component.rounding or not residual.any():
        return None
    places = chosen_places(residual)
    places = np.random.default_rng(1).permutation(places)[:PLACES]
    wanted = taken(residual, places)
    channels = np.argsort(-(wanted**2).sum(0), kind="stable")[:CHANNELS]
    read = patches(reading.x, reading.geometry, reading.weight.shape[2:], places)
    inside = patches(np.ones_like(reading.x[:1]), reading.geometry, reading.weight.shape[2:], places)[:, 0]
    rounding = component.rounding * np.sqrt(len(places) * len(channels) / own.size)
    bias = _bias(component)[channels]
    return Looked(wanted[:, channels], read, inside, reading.weight[channels], bias, rounding)


def _bias(component: Component) -> np.ndarray:
    bias = component.facts.get("bias")
    return np.zeros(len(component.facts["weight"])) if bias is None else np.asarray(bias, np.float64)


def _law(says: str, size: float, add: Change, figure: Matrices | None = None) -> Law:
    def apply(other: Component) -> np.ndarray | None:
        reading = reading_of(other)
        change = None if reading is None else add(reading, other)
        if change is None:
            return None
        return (other.own + laid_out(change, other.own.shape)).astype(other.own.dtype)

    return Law(says, size, apply, figure)


def _of_bias(reading: Reading, other: Component) -> np.ndarray:
    return np.tile(_bias(other), (int(np.prod(other.own.shape[2:])), 1))


def _of_input(reading: Reading, other: Component) -> np.ndarray:
    return convolved(reading.x, reading.weight, reading.geometry, all_places(other.own.shape))


def _of_ones(reading: Reading, other: Component) -> np.ndarray:
    ones, summed = np.ones_like(reading.x[:1]), reading.weight.sum(1, keepdims=True)
    return convolved(ones, summed, reading.geometry, all_places(other.own.shape))


def _of_border(reading: Reading, other: Component) -> np.ndarray:
    return reading.weight.sum((1, 2, 3, 4)) - _of_ones(reading, other)


def _constants(looked: Looked) -> Iterator[Law]:
    """What one number says: of the bias, of the input as a whole, of what stands outside the border."""
    count = len(looked.residual)
    summed = looked.weight.sum(1).reshape(len(looked.weight), -1).T
    ones = looked.inside.reshape(count, -1) @ summed
    read = looked.patches.reshape(count, -1) @ looked.weight.reshape(len(looked.weight), -1).T
    for part, term, what in (
        (np.tile(looked.bias, (count, 1)), _of_bias, "the bias"),
        (read, _of_input, "the input"),
        (ones, _of_ones, ""),
        (summed.sum(0) - ones, _of_border, ""),
    ):
        fit = _one_number(part, looked)
        if fit is None:
            continue
        factor, within = fit
        if what:
            total, said = plainest(1 + factor, within)
            factor = total - 1
            says = f"{what} is missing" if abs(total) <= within else f"{what} counts {said} times"
        else:
            factor, said = plainest(factor, within)
            says = f"the convolution pads with {said}"
            if term is _of_ones:
                says = f"the input is {said.removeprefix('-')} {'less' if factor < 0 else 'more'}"
        yield _law(says, 1, lambda r, other, term=term, factor=factor: factor * term(r, other))


def _one_number(part: np.ndarray, looked: Looked) -> tuple[float, float] | None:
    """How often a part makes the residual, and how exactly that is known; None where it does not."""
    square = float((part * part).sum())
    if not square:
        return None
    factor = float((part * looked.residual).sum()) / square
    left = norm_of(looked.residual - factor * part)
    if left > max(looked.rounding, LEFT_BESIDE * norm_of(looked.residual)):
        return None
    return factor, max(looked.rounding, 0.1 * left) / np.sqrt(square)


def _factors(looked: Looked) -> Iterator[Law]:
    """How often each frame of the kernel, each of its taps and each input channel counts."""
    _, _, frames, rows, columns = looked.weight.shape
    for name, axes, count in (
        ("kernel frame", "nithw,oithw->tno", frames),
        ("kernel tap", "nithw,oithw->thwno", frames * rows * columns),
        ("input channel", "nithw,oithw->ino", looked.weight.shape[1]),
    ):
        terms = np.einsum(axes, looked.patches, looked.weight).reshape(count, -1)
        if count < 2 or count * 2 > terms.shape[1]:
            continue
        wanted = looked.residual.ravel()
        gram = terms @ terms.T
        factors = np.linalg.lstsq(gram + 1e-12 * np.trace(gram) / count * np.eye(count), terms @ wanted, rcond=None)[0]
        left = norm_of(wanted - factors @ terms)
        if left > max(looked.rounding, LEFT * norm_of(wanted)):
            continue
        norms = np.sqrt(np.diag(gram))
        # What a factor changes has to be seen beside what is left.
        level = np.maximum(4 * max(left, looked.rounding) / np.sqrt(len(wanted) / count), 1e-9) / np.maximum(
            norms, 1e-30
        )
        moved = np.abs(factors) > np.maximum(level, 0.02 * np.abs(factors).max())
        if moved.any() and not moved.all():
            yield from _counted(name, factors, moved, float(level[moved].max()), looked.weight.shape)


def _counted(name: str, factors: np.ndarray, moved: np.ndarray, within: float, shape: tuple[int, ...]) -> Iterator[Law]:
    """A law of the parts of a kernel that count otherwise than once."""
    alike = float(factors[moved].mean())
    same = np.ptp(factors[moved]) <= max(4 * within, 0.02 * abs(alike))
    total, said = plainest(1 + alike, max(within, 1e-6))
    counts = np.where(moved, total if same else 1 + factors, 1.0)
    if same:
        says = "left out" if abs(total) <= max(within, 1e-6) else f"counted {said} times"
        counts = np.where(moved & (abs(total) <= max(within, 1e-6)), 0.0, counts)
    else:
        says = f"counted {counts[moved].min():.4g} to {counts[moved].max():.4g} times"
    where = spans(name, moved)[0]
    words = where.those
    if name == "kernel tap" and moved.sum() == 1:
        at = ", ".join(map(str, np.unravel_index(int(np.argmax(moved)), shape[2:])))
        words = f"the kernel's tap ({at})"
    many = moved.sum() > 1

    def add(reading: Reading, other: Component) -> np.ndarray | None:
        _, inner, *taps = reading.weight.shape
        sides = {"input channel": (1, inner, 1, 1, 1), "kernel frame": (1, 1, taps[0], 1, 1)}
        side = sides.get(name, (1, 1, *taps))
        if int(np.prod(side)) != len(counts):
            return None
        step = reading.weight * (counts - 1).reshape(side)
        return convolved(reading.x, step, reading.geometry, all_places(other.own.shape))

    size = where.size + (0.5 if not total and same else 1 if same else float(moved.sum()))
    yield _law(f"{words} {'are' if many else 'is'} {says}", size, add)


def _exchanged(looked: Looked) -> Iterator[Law]:
    """An input channel that is read in another's place, or two that are exchanged."""
    count = looked.weight.shape[1]
    if count < 2:
        return
    # How much of the residual each channel's patches explain through each channel's weights.
    through = np.einsum("nithw,no->ithwo", looked.patches, looked.residual)
    shared = np.einsum("jthwo,oithw->ij", through, looked.weight)
    gains = shared - np.diag(shared)[:, None]
    best = np.argsort(-gains, axis=None, kind="stable")[:PAIRS]
    limit = max(looked.rounding, LEFT * norm_of(looked.residual))
    for first, second in zip(*np.unravel_index(best, gains.shape), strict=True):
        if first == second or gains[first, second] <= 0:
            continue
        apart = looked.patches[:, second] - looked.patches[:, first]
        alone = np.einsum("nthw,othw->no", apart, looked.weight[:, first])
        both = alone - np.einsum("nthw,othw->no", apart, looked.weight[:, second])
        one, two = int(first), int(second)
        if norm_of(looked.residual - alone) <= limit:
            yield _law(f"input channel {one} is read from channel {two}", 2, _reads({one: two}))
        elif norm_of(looked.residual - both) <= limit and one < two:
            yield _law(f"input channels {one} and {two} are exchanged", 2, _reads({one: two, two: one}))


def _reads(other_of: dict[int, int]) -> Change:
    def add(reading: Reading, other: Component) -> np.ndarray | None:
        if max(*other_of, *other_of.values()) >= len(reading.x):
            return None
        at, source = list(other_of), list(other_of.values())
        apart = reading.x[source] - reading.x[at]
        return convolved(apart, reading.weight[:, at], reading.geometry, all_places(other.own.shape))

    return add


FITTERS = (parts, kernel)
