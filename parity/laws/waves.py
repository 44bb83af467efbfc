"""Laws of embeddings made of sines and cosines: of places as they are, of times through two layers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.integers import Change, View, changes
from parity.laws.mixture import comparable, enough, rounded_as
from parity.laws.numbers import plainest, told
from parity.laws.rounding import DTYPES, rounded_to
from parity.laws.segments import TEXT, Segment


@dataclass(frozen=True)
class Waves:
    """Sines and cosines of numbers at falling frequencies.

    Attributes:
        period: how much lower the last frequency is than the first, but for one step.
        scale, offset: what the numbers are multiplied by, and what is added then.
        less: what is taken off the number of frequencies where they are spaced.
        order: "sines first", "cosines first", "sines and cosines alternate" or "cosines and sines alternate".
        angles: the dtype that they are rounded to.
    """

    period: float
    order: str
    scale: float = 1.0
    offset: float = 0.0
    less: float = 0.0
    angles: str = "float32"

    def of(self, numbers: np.ndarray, width: int) -> np.ndarray:
        """Numbers [n] as float64 [n, width]."""
        half = width // 2
        frequencies = self.period ** (-np.arange(half) / max(half - self.less, 1e-9))
        angles = (numbers[:, None] * self.scale + self.offset) * frequencies
        angles = angles if self.angles == "float32" else rounded_to(self.angles, angles)
        sines, cosines = np.sin(angles), np.cos(angles)
        first, second = (sines, cosines) if self.order.startswith("sines") else (cosines, sines)
        if self.order.endswith("alternate"):
            return np.stack([first, second], -1).reshape(len(numbers), width)
        return np.concatenate([first, second], 1)

    def against(self, other: "Waves", what: str, are: str, count: str) -> tuple[str, float]:
        """How this differs from what it should be, and how many numbers that takes; `what` the numbers are called, with
        two verbs for them."""
        words: list[str] = []
        if self.order != other.order:
            words.append(f"{self.order}" if "alternate" in self.order else f"{self.order.split()[0]} come first")
        if self.period != other.period:
            words.append(f"the longest period is {self.period:.4g}")
        if self.scale != other.scale:
            words.append(f"{what} {count} {_ratio(self.scale)} times")
        if self.offset != other.offset:
            words.append(f"{what} {are} off by {self.offset:+.4g}")
        if self.less != other.less:
            words.append("frequencies are spaced by their number" + (f" less {self.less:g}" if self.less else ""))
        if self.angles != other.angles:
            words.append(f"angles are {self.angles}")
        # A spacing is chosen, a period is read.
        return " and ".join(words), len(words) + 0.1 * (self.period != other.period)


ORDERS = ("sines first", "cosines first", "sines and cosines alternate", "cosines and sines alternate")


def sinusoids(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Own [n, hidden]: side by side the waves of places [n, axes].

    Inputs places; facts widths by axis, waves (what they should be), names of the axes, most: places in a table.
    """
    if not comparable(component, got) or got.ndim != 2:
        return
    places = component.inputs["places"].astype(np.float64)
    widths, right, names = (component.facts[name] for name in ("widths", "waves", "names"))
    if sum(widths) != got.shape[1] or len(places) != len(got):
        return
    edges = list(pairwise(np.cumsum([0, *widths]).tolist()))
    found: list[tuple[int, str, float, Callable[[np.ndarray, int, int], np.ndarray]]] = []
    for axis, (start, stop) in enumerate(edges):
        own, new = component.own[:, start:stop].astype(np.float64), got[:, start:stop].astype(np.float64)
        if np.linalg.norm(new - own) <= 2 * component.rounding + 1e-5 * np.linalg.norm(own):
            continue
        ways = list(_of_axis(places, axis, stop - start, right, own, new, names))
        if ways:
            found.append((axis, *min(ways, key=lambda way: way[1])))
    if not found:
        return
    same = len({words for _, words, _, _ in found}) == 1
    said = found[0][1] if same else " and ".join(f"of {names[axis]} {words}" for axis, words, _, _ in found)
    moving = [axis for axis in range(len(names)) if len(np.unique(places[:, axis])) > 1]
    if same and not {axis for axis, *_ in found} >= set(moving):
        said = f"of {' and '.join(names[axis] for axis, *_ in found)} {said}"

    def apply(other: Component) -> np.ndarray | None:
        seen, new = other.inputs["places"].astype(np.float64), other.own.astype(np.float64)
        for axis, _, _, make in found:
            start, stop = edges[axis]
            new[:, start:stop] = make(seen, axis, stop - start)
        return rounded_as(other.own, new).astype(np.float32)

    size = found[0][2] if same else sum(size for _, _, size, _ in found)
    law = Law(said, size + (0 if same else 0.5), apply)
    if enough(component, got, law.apply(component)):
        yield law


def _of_axis(
    places: np.ndarray,
    axis: int,
    width: int,
    right: Waves,
    own: np.ndarray,
    new: np.ndarray,
    names: tuple[str, ...],
) -> Iterator[tuple[str, float, Callable[[np.ndarray, int, int], np.ndarray]]]:
    """What the part of one axis may be: waves of other places, or other waves."""
    whole = np.linalg.norm(new - own)

    def fits(value: np.ndarray) -> bool:
        return bool(np.linalg.norm(new - value) <= 0.05 * whole)

    for other in range(places.shape[1]):
        if other != axis and fits(right.of(places[:, other], width)):
            yield f"the places are those of {names[other]}", 1, lambda seen, axis, width, other=other: right.of(
                seen[:, other], width)  # fmt: skip
    for waves in _waves(places[:, axis], width, right, new):
        words, size = waves.against(right, "the places", "are", "count")
        if words and fits(waves.of(places[:, axis], width)):
            yield words, size, lambda seen, axis, width, waves=waves: waves.of(seen[:, axis], width)
    # Which place's waves each row has.
    top = max(int(places.max()) * 2 + 2, 64)
    table = right.of(np.arange(top, dtype=np.float64), width)
    found = (2 * new @ table.T - np.sum(table * table, 1)).argmax(1)
    if not fits(table[found]):
        return
    if np.array_equal(found, places[:, axis]):
        yield "the waves are not rounded", 0.5, lambda seen, axis, width: right.of(seen[:, axis], width)
        return
    segment = Segment("all", TEXT, "all", 0, 0, 0, len(found))
    for change in changes(View(places[:, axis].astype(np.int64)[None], (segment,)), segment, 0, found):
        if "place" in change.words or "segment" in change.words:
            continue

        def moved(seen: np.ndarray, axis: int, width: int, change: Change = change) -> np.ndarray:
            every = Segment("all", TEXT, "all", 0, 0, 0, len(seen))
            view = View(seen[:, axis].astype(np.int64)[None], (every,))
            return right.of(np.asarray(change.call(view, every, 0), np.float64), width)

        yield f"the places are {change.words}", change.size, moved


def _waves(places: np.ndarray, width: int, right: Waves, new: np.ndarray) -> Iterator[Waves]:
    """Waves whose frequencies, and what is added to places, are read from how angles turn from place to place."""
    half = width // 2
    numbers = np.unique(places)
    for order in ORDERS:
        yield replace(right, order=order)
        if len(numbers) < 2 or half < 3 or 2 * half != width:
            continue
        parts = (
            new.reshape(len(new), half, 2).swapaxes(1, 2) if order.endswith("alternate") else new.reshape(-1, 2, half)
        )
        sines, cosines = (parts[:, 0], parts[:, 1]) if order.startswith("sines") else (parts[:, 1], parts[:, 0])
        points = cosines + 1j * sines
        means = np.stack([points[places == number].mean(0) for number in numbers[:8]])
        if np.abs(np.abs(means) - 1).max() > 0.05:
            continue
        turns = np.angle(means[1:] * means[:-1].conj()) / np.diff(numbers[:8])[:, None]
        slopes = np.median(turns, 0)
        if np.ptp(np.diff(numbers[:8])) == 0:
            yield replace(right, order=order, scale=_counted(slopes * (step := numbers[1] - numbers[0]), right) / step)
        if (slopes <= 0).any() or slopes[0] > 3:
            continue
        fall, start = np.polyfit(np.arange(half), np.log(slopes), 1)
        near = max(3 * float(np.std(np.log(slopes) - start - fall * np.arange(half))), 1e-5)
        scale = plainest(float(np.exp(start)), near * np.exp(start))[0]
        offsets = np.angle(means[0] * np.exp(-1j * numbers[0] * slopes))
        offset = plainest(float(np.median(offsets / slopes * scale)), 5e-3)[0]
        for less in (0.0, 1.0, -1.0):
            period = float(np.exp(-fall * max(half - less, 1e-9)))
            plain = plainest(period, max(near, 1e-4) * period)[0]
            yield Waves(plain, order, scale, offset, less)
            if abs(period - right.period) < 5 * near * right.period:
                yield Waves(right.period, order, scale, offset, less)


def _ratio(value: float) -> str:
    """A number in words, a third and the like as such."""
    below = next((n for n in range(1, MOST_PLACES) if abs(round(value * n) / n - value) < 1e-9 * abs(value)), 1)
    plain = told(value)
    return f"{round(value * below)}/{below}" if below > 1 and float(plain) != value else plain


def _counted(turns: np.ndarray, right: Waves) -> float:
    """How many times as far as it should each frequency turns, where the fast ones turn more than once: told by the
    slow ones how often."""
    half, times = len(turns), [0.0]
    frequencies = right.period ** (-np.arange(half) / max(half - right.less, 1e-9))
    for turn, frequency in zip(turns[::-1], frequencies[::-1], strict=True):
        whole = np.round((times[-1] * frequency - turn) / (2 * np.pi)) if times[-1] else 0.0
        times.append(float(turn + 2 * np.pi * whole) / frequency)
    # Places are stretched from one number of them to another.
    near = max(2 * abs(times[-1] - times[-2]), 1e-6 * abs(times[-1]))
    ratios = (round(times[-1] * below) / below for below in range(1, MOST_PLACES))
    return next((ratio for ratio in ratios if ratio and abs(ratio - times[-1]) <= near), times[-1])


@dataclass(frozen=True)
class Perceptron:
    """Two products with a weight and an activation between: w1 [hidden, in], w2 [out, hidden]."""

    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray
    activation: str = "silu"
    bias: tuple[bool, bool] = (True, True)
    steps: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=lambda: ACTIVATIONS, repr=False)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        hidden = self.steps[self.activation](x @ self.w1.T + self.b1 * self.bias[0])
        return hidden @ self.w2.T + self.b2 * self.bias[1]


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-np.clip(x, -60, 60))),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "quick gelu": lambda x: x / (1 + np.exp(-1.702 * np.clip(x, -30, 30))),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-np.clip(x, -60, 60))),
    "no activation": lambda x: x,
}
# Places that other places are stretched from, by a ratio of the two.
MOST_PLACES = 65
PERIODS = (100.0, 1000.0, 5000.0, 20000.0, 50000.0, 100000.0, 1e6)
SCALES = (1000.0, 0.001, 100.0, 10.0, 2.0, 0.5, 999.0, -1.0, 2 * np.pi)


def waves_through_layers(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Own [n, hidden] or [hidden]: waves of numbers [n] through a two-layer perceptron.

    Inputs numbers; facts waves, width, layers (a Perceptron), times: other numbers by what they are called.
    """
    if not comparable(component, got):
        return
    right, layers, width = (component.facts[name] for name in ("waves", "layers", "width"))
    numbers = component.inputs["numbers"].astype(np.float64)
    if got.size != len(numbers) * got.shape[-1]:
        return
    new = got.reshape(len(numbers), -1).astype(np.float64)
    own = component.own.reshape(new.shape).astype(np.float64)
    base = layers(right.of(numbers, width))
    whole = float(np.linalg.norm(new - own))

    def left(waves: Waves, through: Perceptron = layers, t: np.ndarray = numbers) -> float:
        # As a change of what is computed, so that rounding is in both.
        return float(np.linalg.norm(new - own - (through(waves.of(t, width)) - base)))

    tried: list[tuple[float, str, float, Waves, Perceptron, str]] = []

    def consider(waves: Waves, size: float, through: Perceptron = layers, extra: str = "", source: str = "") -> None:
        t = numbers if not source else np.broadcast_to(component.facts["times"][source], numbers.shape)
        words = " and ".join(
            filter(None, [waves.against(right, "t", "is", "counts")[0], extra, source and f"t is {source}"])
        )
        if words:
            tried.append((left(waves, through, t), words, size, waves, through, source))

    for order in ORDERS:
        one = replace(right, order=order)
        consider(one, 1)
        changes = [{"period": p} for p in PERIODS] + [{"scale": s} for s in SCALES]
        changes += [{"angles": dtype} for dtype in DTYPES]
        for change in (*changes, {"less": 1.0}, {"less": -1.0}, {"scale": -1.0, "offset": 1.0}):
            consider(replace(one, **change), 1 + (order != right.order) + 0.5 * (len(change) > 1))
    for source in component.facts.get("times", {}):
        consider(right, 1, source=source)
    for activation in ACTIVATIONS:
        if activation != layers.activation:
            consider(right, 1, replace(layers, activation=activation), f"the activation is {activation}")
    for bias in ((False, True), (True, False), (False, False)):
        which = {(False, True): "first bias is", (True, False): "second bias is", (False, False): "biases are"}[bias]
        consider(right, 1, replace(layers, bias=bias), f"the {which} left out")
    if min(tried)[0] > max(component.rounding, 0.05 * whole):
        for name in ("scale", "period", "offset"):
            value = _searched(right, name, left)
            if value is not None:
                consider(replace(right, **{name: value}), 1.5)
    for rest, words, size, waves, through, source in sorted(tried, key=lambda item: item[0])[:3]:
        if rest > max(1.2 * component.rounding, 0.05 * whole):
            continue

        def apply(
            other: Component, waves: Waves = waves, through: Perceptron = through, source: str = source
        ) -> np.ndarray | None:
            numbers = other.inputs["numbers"].astype(np.float64)
            t = numbers if not source else np.broadcast_to(other.facts["times"][source], numbers.shape)
            change = through(waves.of(t, width)) - layers(right.of(numbers, width))
            return (other.own + change.reshape(other.own.shape)).astype(np.float32)

        yield Law(f"in the embedding of t {words}", size, apply)


def _searched(right: Waves, name: str, left: Callable[[Waves], float]) -> float | None:
    """The value of one number of the waves that leaves least, where it is clearly better than its surroundings."""
    grid = np.linspace(-1, 1, 81) if name == "offset" else getattr(right, name) * np.logspace(-3, 3, 121)
    at = lambda value: left(replace(right, **{name: float(value)}))  # noqa: E731
    errors = [at(value) for value in grid]
    best = int(np.argmin(errors))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    for _ in range(40):
        third = (high - low) / 3
        if at(low + third) < at(high - third):
            high -= third
        else:
            low += third
    value = float((low + high) / 2)
    if at(value) > 0.3 * float(np.median(errors)):
        return None
    plain = plainest(value, 1e-3 * abs(value))[0]
    return plain if at(plain) <= 1.5 * at(value) + 1e-12 else value
