"""Laws of a convolution [1, in, T, H, W] -> [1, out, T', H', W']: where it reads, what stands outside and before."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.patches import (
    EDGE,
    MIRROR,
    MIRROR_TWICE,
    OPPOSITE,
    Geometry,
    all_places,
    convolved,
    geometry_of,
    laid_out,
    taken,
)
from parity.laws.rounding import DTYPES
from parity.laws.support import Span, energies, mask, spans

# Outputs and channels of them that a law is looked for at.
PLACES, CHANNELS = 320, 6
LEFT, LEFT_IN_PART = 0.05, 0.5
MODES = {
    EDGE: "repeats the border",
    MIRROR: "mirrors at the border's values",
    MIRROR_TWICE: "mirrors at the border",
    OPPOSITE: "pads with the opposite border",
}


@dataclass(frozen=True)
class Reading:
    """What a convolution reads and multiplies it with."""

    x: np.ndarray
    weight: np.ndarray
    geometry: Geometry
    history: int


@dataclass(frozen=True)
class Variant:
    """Another convolution: how it is said, how many numbers say it, and what it does instead; None without meaning."""

    says: str
    size: float
    of: Callable[[Reading], Reading | None]


def reading_of(component: Component) -> Reading | None:
    """What a convolution should read; None where too little is known of it."""
    x, weight = component.inputs.get("x"), component.facts.get("weight")
    if x is None or weight is None or x.ndim != 5 or weight.ndim != 5 or component.own.ndim != 5:
        return None
    if x.shape[1] != weight.shape[1] or component.own.shape[1] != len(weight) or not np.isfinite(x).all():
        return None
    wide = np.float64 if weight.size < 2**21 else np.float32
    return Reading(x[0].astype(wide), weight.astype(wide), geometry_of(component), component.facts.get("history", 0))


def variants(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Another padding, offset, history, order of the kernel or precision, in a part of the result or all of it."""
    reading, own = reading_of(component), component.own
    if reading is None or own.shape != got.shape or not np.isfinite(got).all():
        return
    residual = got.astype(np.float64) - own
    if np.linalg.norm(residual) <= component.rounding or not residual.any():
        return
    places = chosen_places(residual)
    channels = np.argsort(-energies(residual, 1), kind="stable")[:CHANNELS]
    wanted = taken(residual, places)[:, channels]
    found = []
    right = _at(reading, places, channels)
    for variant in _all(reading):
        other = variant.of(reading)
        if other is None:
            continue
        change = _at(other, places, channels) - right
        # In each place or channel the change is there, or it is not.
        gain = np.linalg.norm(wanted) ** 2 - min(_apart(wanted, change, axis) for axis in (0, 1))
        if gain >= (1 - LEFT_IN_PART**2) * np.linalg.norm(wanted) ** 2:
            found.append((gain, variant))
    # Those that leave little more than the best.
    whole = np.linalg.norm(wanted) ** 2
    least = min((whole - gain for gain, _ in found), default=0.0)
    found = [item for item in found if whole - item[0] <= max(4 * least, 0.01 * whole)]
    for _, variant in sorted(found, key=lambda item: (-item[0], item[1].size))[:4]:
        change = _change(component, variant)
        if change is not None:
            yield from _in_part(component, residual, variant, change)


def chosen_places(residual: np.ndarray) -> np.ndarray:
    """Outputs [n, 3] at which a residual [1, out, T, H, W] is looked at: those that it is largest at among them."""
    places = all_places(residual.shape)
    if len(places) <= PLACES:
        return places
    sizes = energies(residual[0].reshape(len(residual[0]), -1), 1)
    worst = np.argsort(-sizes, kind="stable")[: PLACES // 3]
    others = np.random.default_rng(0).choice(len(places), PLACES - len(worst), replace=False)
    return places[np.unique(np.concatenate([worst, others]))]


def _at(reading: Reading, places: np.ndarray, channels: np.ndarray | slice = slice(None)) -> np.ndarray:
    return convolved(reading.x, reading.weight[channels], reading.geometry, places)


def _apart(residual: np.ndarray, change: np.ndarray, axis: int) -> float:
    """What a change leaves of a residual, squared, if each slice along an axis has it or not."""
    return float(np.minimum(energies(residual, axis), energies(residual - change, axis)).sum())


def _change(component: Component, variant: Variant) -> np.ndarray | None:
    """What a variant adds to a component's result, float64 in its shape."""
    reading = reading_of(component)
    other = None if reading is None else variant.of(reading)
    if other is None:
        return None
    places = all_places(component.own.shape)
    return laid_out(_at(other, places) - _at(reading, places), component.own.shape).astype(np.float64)


def _in_part(component: Component, residual: np.ndarray, variant: Variant, change: np.ndarray) -> Iterator[Law]:
    """A variant as a law of all, or of the part along one axis that it is true in."""
    level = max(component.rounding, LEFT * np.linalg.norm(residual))
    if np.linalg.norm(residual - change) <= level:
        yield _law(variant, None)
        return
    within = [np.linalg.norm(residual - change)]
    laws = [_law(variant, None)]
    for axis, name in enumerate(component.axes):
        has = energies(residual - change, axis) < energies(residual, axis)
        for span in spans(name, has):
            shown = np.where(mask([span], component.axes, change.shape), change, 0)
            within.append(np.linalg.norm(residual - shown))
            laws.append(_law(variant, span))
    least = min(within)
    if least <= max(level, LEFT_IN_PART * np.linalg.norm(residual)):
        yield from (law for law, left in zip(laws, within, strict=True) if left <= max(1.05 * least, level))


def _law(variant: Variant, span: Span | None) -> Law:
    def apply(other: Component) -> np.ndarray | None:
        change = _change(other, variant)
        if change is None:
            return None
        where = True if span is None else mask([span], other.axes, other.own.shape)
        return None if where is None else (other.own + np.where(where, change, 0)).astype(other.own.dtype)

    says = variant.says if span is None else f"{span.within} {variant.says}"
    return Law(says, variant.size + (span.size if span else 0), apply)


def _all(reading: Reading) -> Iterator[Variant]:
    """The other convolutions that have a meaning for one."""
    yield from _borders(reading)
    yield from _offsets(reading)
    yield from _inputs(reading)
    yield from _kernels(reading)
    if reading.weight.shape[2] > 1:
        yield from _histories(reading)
    for dtype, to in DTYPES.items():
        yield Variant(f"the convolution reads its input as {dtype}", 1, lambda r, to=to: replace(r, x=to(r.x)))
        yield Variant(f"the convolution rounds its kernel to {dtype}", 1,
                      lambda r, to=to: replace(r, weight=to(r.weight)))  # fmt: skip
        yield Variant(f"the convolution multiplies in {dtype}", 1,
                      lambda r, to=to: replace(r, x=to(r.x), weight=to(r.weight)))  # fmt: skip
    yield from _channel_orders(reading.weight.shape[1])


def _moved(says: str, size: float, **changes: object) -> Variant:
    return Variant(says, size, lambda r: replace(r, geometry=replace(r.geometry, **changes)))


def _borders(reading: Reading) -> Iterator[Variant]:
    if max(reading.weight.shape[3:]) > 1:
        pad = max(-min(reading.geometry.start[1:]), 1)
        for mode, says in MODES.items():
            if mode == MIRROR_TWICE and pad < 2:
                # One row beside the border is the border.
                continue
            yield _moved(f"the convolution {says}", 1, modes=("zero", mode, mode))
            for axis, name in ((1, "rows"), (2, "columns")):
                modes = ["zero"] * 3
                modes[axis] = mode
                yield _moved(f"the convolution {says} along {name}", 1.5, modes=tuple(modes))


def _offsets(reading: Reading) -> Iterator[Variant]:
    """Reading so many rows and columns further on."""
    for down, right in product((-2, -1, 0, 1, 2), repeat=2):
        if not (down or right) or (abs(down) == 2 or abs(right) == 2) and down and right and abs(down) != abs(right):
            continue
        said = [f"{abs(down)} {_of('row', down)} {'lower' if down > 0 else 'higher'}"] if down else []
        said += [f"{abs(right)} {_of('column', right)} further {'right' if right > 0 else 'left'}"] if right else []

        def of(r: Reading, down: int = down, right: int = right) -> Reading:
            frame, row, column = r.geometry.start
            return replace(r, geometry=replace(r.geometry, start=(frame, row + down, column + right)))

        yield Variant(f"the convolution reads {' and '.join(said)}", len(said), of)


def _inputs(reading: Reading) -> Iterator[Variant]:
    """Rows and columns of the input in another order."""
    for axis, name in ((2, "rows"), (3, "columns")):
        if reading.x.shape[axis] < 2:
            continue
        for by in (1, -1):
            yield Variant(f"the input's {name} are rolled by {by}", 1.2,
                          lambda r, by=by, axis=axis: replace(r, x=np.roll(r.x, by, axis)))  # fmt: skip
        yield Variant(f"the input's {name} are reversed", 1.2,
                      lambda r, axis=axis: replace(r, x=np.flip(r.x, axis)))  # fmt: skip
    yield Variant("the input's rows and columns are exchanged in memory", 1.2,
                  lambda r: replace(r, x=np.ascontiguousarray(r.x.swapaxes(2, 3)).reshape(r.x.shape)))  # fmt: skip


def _of(name: str, count: int) -> str:
    return name if abs(count) == 1 else f"{name}s"


def _kernels(reading: Reading) -> Iterator[Variant]:
    for axes, name in (((2,), "in time"), ((3,), "in its rows"), ((4,), "in its columns"),
                       ((3, 4), "in rows and columns"), ((2, 3, 4), "in time, rows and columns")):  # fmt: skip
        if all(reading.weight.shape[axis] > 1 for axis in axes):
            yield Variant(f"the kernel is reversed {name}", 1,
                          lambda r, axes=axes: replace(r, weight=np.flip(r.weight, axes)))  # fmt: skip
    _, inner, _, rows, columns = reading.weight.shape
    if rows == columns > 1:
        yield Variant("the kernel's rows and columns are exchanged", 1,
                      lambda r: replace(r, weight=r.weight.swapaxes(3, 4)))  # fmt: skip
    if reading.weight.shape[2] == rows == columns > 1:
        yield Variant("the kernel's frames and rows are exchanged", 1,
                      lambda r: replace(r, weight=r.weight.swapaxes(2, 3)))  # fmt: skip
        yield Variant("the kernel's frames and columns are exchanged", 1,
                      lambda r: replace(r, weight=r.weight.swapaxes(2, 4)))  # fmt: skip
    if len(reading.weight) == inner > 1:
        yield Variant("the kernel's inputs and outputs are exchanged", 1,
                      lambda r: replace(r, weight=r.weight.swapaxes(0, 1)))  # fmt: skip
    if rows > 1:

        def spread(r: Reading) -> Reading:
            frame, row, column = r.geometry.start
            start = (frame, row - (rows - 1) // 2, column - (columns - 1) // 2)
            return replace(r, geometry=replace(r.geometry, start=start, dilation=(1, 2, 2)))

        yield Variant("the kernel is dilated by 2", 1, spread)


def _histories(reading: Reading) -> Iterator[Variant]:
    """Other frames before the present ones."""

    def before(says: str, change: Callable[[np.ndarray, np.ndarray], np.ndarray], least: int = 1) -> Variant:
        def of(r: Reading) -> Reading | None:
            if r.history < least or r.x.shape[1] <= r.history:
                return None
            past, now = r.x[:, : r.history], r.x[:, r.history :]
            return replace(r, x=np.concatenate([change(past, now), now], 1))

        return Variant(f"the convolution {says}", 1, of)

    for says, change, least in (
        ("takes zeros for the frames before", lambda past, now: 0 * past, 1),
        ("repeats the present's first frame before it", lambda past, now: 0 * past + now[:, :1], 1),
        ("takes the frame before for all earlier ones", lambda past, now: 0 * past + past[:, -1:], 2),
        ("takes the earliest frame for all before", lambda past, now: 0 * past + past[:, :1], 2),
        ("reads the frames before in reverse", lambda past, now: past[:, ::-1], 2),
        ("remembers the frame before alone", lambda past, now: _kept(past, slice(-1, None)), 2),
        ("remembers the earliest frame alone", lambda past, now: _kept(past, slice(0, 1)), 2),
        ("lacks the frame before: all before are one older", lambda past, now: _older(past), 2),
        ("takes the present's last frames for those before", lambda past, now: _last(past, now), 1),
        *(
            (f"remembers the frames before in {dtype}", lambda past, now, to=to: to(past), 1)
            for dtype, to in DTYPES.items()
        ),
    ):
        yield before(says, change, least)
    for by in (1, 2, -1):
        for mode, edge in (("zero", "zeros"), (EDGE, "the last one repeated")):

            def of(r: Reading, by: int = by, mode: str = mode) -> Reading:
                frame, *rest = r.geometry.start
                modes = (mode, *r.geometry.modes[1:])
                return replace(r, geometry=replace(r.geometry, start=(frame + by, *rest), modes=modes))

            side = f"ahead, {edge} after the present" if by > 0 else f"back, {edge.replace('last', 'first')} before"
            yield Variant(f"the convolution reads {abs(by)} {_of('frame', by)} {side}", 1.5, of)

    def reversed_frames(r: Reading) -> Reading:
        past, now = r.x[:, : r.history], r.x[:, r.history :]
        return replace(r, x=np.concatenate([past, now[:, ::-1]], 1))

    if reading.x.shape[1] - reading.history > 1:
        yield Variant("the convolution reads the present's frames in reverse", 1, reversed_frames)


def _kept(past: np.ndarray, which: slice) -> np.ndarray:
    kept = np.zeros_like(past)
    kept[:, which] = past[:, which]
    return kept


def _older(past: np.ndarray) -> np.ndarray:
    return np.concatenate([0 * past[:, :1], past[:, :-1]], 1)


def _last(past: np.ndarray, now: np.ndarray) -> np.ndarray:
    count = past.shape[1]
    return now[:, -count:] if now.shape[1] >= count else past


def _channel_orders(count: int) -> Iterator[Variant]:
    orders = {"reversed": np.arange(count)[::-1], "rolled by 1": np.roll(np.arange(count), 1),
              "rolled by -1": np.roll(np.arange(count), -1)}  # fmt: skip
    if count % 2 == 0:
        orders["exchanged in pairs"] = np.arange(count) ^ 1
        orders["exchanged by halves"] = np.roll(np.arange(count), count // 2)
        orders["read as two by half where they are half by two"] = np.arange(count).reshape(2, -1).T.ravel()
        orders["read as half by two where they are two by half"] = np.arange(count).reshape(-1, 2).T.ravel()
    for says, order in orders.items() if count > 1 else ():

        def of(r: Reading, order: np.ndarray = order) -> Reading | None:
            return replace(r, x=r.x[order]) if len(r.x) == len(order) else None

        yield Variant(f"input channels are {says}", 1, of)
