"""How a guided velocity is scaled back, read from the factor that was found."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from parity.laws.numbers import plainest
from parity.laws.rounding import Rounded

EPS = 1e-8
GROUPS = {"global": (0, 1), "per token": (1,), "per channel": (0,)}
MEASURES: dict[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray]] = {
    "length": lambda v, axes: np.sqrt(np.sum(v * v, axes, keepdims=True)),
    "deviation": lambda v, axes: v.std(axes, keepdims=True),
    "deviation less one degree of freedom": lambda v, axes: v.std(axes, ddof=1, keepdims=True),
    "mean absolute value": lambda v, axes: np.abs(v).mean(axes, keepdims=True),
    "largest value": lambda v, axes: np.abs(v).max(axes, keepdims=True),
}


@dataclass(frozen=True)
class Renorm:
    """How a guided velocity is scaled back: by a power of the ratio of one velocity's measure to its own, clamped.

    Attributes:
        over: what a measure is taken over, a key of GROUPS; "none" for no factor.
        measure: a key of MEASURES.
        to: which velocity's measure is aimed at, "cond" or "uncond".
        low, high: bounds of the factor.
        power, blend: the ratio's power, and how much of it is used: 1 + blend (ratio^power - 1).
        eps: what is added to the guided velocity's measure.
    """

    over: str
    measure: str = "length"
    to: str = "cond"
    low: float = 0.0
    high: float = 1.0
    power: float = 1.0
    blend: float = 1.0
    eps: float = EPS

    def factor(
        self, cond: np.ndarray, uncond: np.ndarray, guided: np.ndarray, rounded: Rounded = lambda x: x
    ) -> np.ndarray:
        """The factor [n or 1, c or 1], of measures and a ratio that are rounded."""
        if self.over == "none":
            return np.ones((1, 1))
        axes, measure = GROUPS[self.over], MEASURES[self.measure]
        target = rounded(measure({"cond": cond, "uncond": uncond}[self.to], axes))
        ratio = rounded(target / (rounded(measure(guided, axes)) + self.eps))
        return np.clip(1 + self.blend * (ratio**self.power - 1), self.low, self.high)

    def against(self, other: "Renorm") -> tuple[str, float]:
        """How this differs from what it should be, in words, and how many choices that takes; "" where it is that."""
        if self == other:
            return "", 0
        if self.over == "none":
            return "there is no renorm", 1
        words = [f"is {self.over}"] if self.over != other.over else []
        words += [f"compares the {self.measure}"] if self.measure != other.measure else []
        words += ["aims at the unconditional velocity"] if self.to != other.to else []
        if (self.low, self.high) != (other.low, other.high) and other.over != "none" and self.blend == 1:
            if (self.low, self.high) == (0, np.inf):
                words.append("is not clamped")
            else:
                words += [f"is at least {self.low:.4g}"] if self.low != other.low and self.low else []
                words += ["has no lower bound"] if self.low != other.low and not self.low else []
                words += [f"is at most {self.high:.4g}"] if self.high != other.high and self.high < np.inf else []
                words += ["has no upper bound"] if self.high != other.high and self.high == np.inf else []
        words += [f"is the ratio to the power {plainest(self.power, 0)[1]}"] if self.power != other.power else []
        words += [f"is used to {plainest(self.blend, 0)[1]}"] if self.blend != other.blend else []
        words += [f"has an eps of {self.eps:.4g}"] if self.eps != other.eps else []
        return "the renorm " + " and ".join(words), len(words)


def renorms(
    right: Renorm,
    cond: np.ndarray,
    uncond: np.ndarray,
    mixed: np.ndarray,
    got: np.ndarray,
    axes: tuple[int, ...],
    fine: float,
) -> Iterator[Renorm]:
    """The ways to scale back that make the factor that was found, those that are nearest to what should be first."""
    square = np.sum(mixed * mixed, axes, keepdims=True)
    factor = np.sum(mixed * got, axes, keepdims=True) / np.where(square > 0, square, 1)
    near = np.maximum(3e-3 * np.linalg.norm(got - factor * mixed) / np.linalg.norm(got), max(2e-5, 2 * fine))

    def fits(renorm: Renorm) -> bool:
        found = renorm.factor(cond, uncond, mixed)
        return bool(
            np.abs(np.broadcast_to(found, np.broadcast_shapes(found.shape, factor.shape)) - factor).max() <= near
        )

    # A field's default is what is meant where it should be none.
    meant = right if right.over != "none" else Renorm("global")
    if fits(right):
        yield right
        return
    if fits(Renorm("none")):
        yield Renorm("none")
        return
    tried = [
        Renorm(over, measure, to, low, high)
        for over in GROUPS
        if GROUPS[over] == (0, 1) or GROUPS[over] == axes
        for measure in MEASURES
        for to in ("cond", "uncond")
        for low, high in dict.fromkeys(((meant.low, meant.high), (0.0, np.inf), (0.0, 1.0), (meant.low, np.inf)))
    ]
    tried += [replace(meant, power=power) for power in (2.0, 0.5, -1.0)]
    tried += [replace(meant, power=power, high=np.inf) for power in (2.0, 0.5, -1.0)]
    tried.sort(key=lambda renorm: renorm.against(right)[1])
    found = [renorm for renorm in tried if fits(renorm)][:4]
    yield from found
    if not found:
        yield from (renorm for renorm in _read(meant, cond, uncond, mixed, factor, axes, float(near)) if fits(renorm))


def _read(
    meant: Renorm,
    cond: np.ndarray,
    uncond: np.ndarray,
    mixed: np.ndarray,
    factor: np.ndarray,
    axes: tuple[int, ...],
    near: float,
) -> Iterator[Renorm]:
    """Ways whose bounds, share or eps are read from the factor itself; of one factor alone only plain numbers."""
    over = next(name for name, group in GROUPS.items() if group == axes)
    for measure in ("length", "deviation"):
        plain = replace(meant, over=over, measure=measure, low=0.0, high=np.inf)
        ratio = plain.factor(cond, uncond, mixed)
        if ratio.shape != factor.shape:
            continue
        low, high = float(factor.min()), float(factor.max())
        if factor.size > 4 and high - low > 10 * near:
            yield replace(plain, low=plainest(low, near)[0] if (ratio < low - near).any() else meant.low,
                          high=plainest(high, near)[0] if (ratio > high + near).any() else np.inf)  # fmt: skip
        elif factor.size == 1 and _short(plainest(low, near)[0]):
            said = plainest(low, near)[0]
            side = {"low": said} if ratio.max() < low else {"high": said, "low": meant.low}
            yield replace(plain, **({"high": meant.high} | side))
        away = ratio - 1
        if np.abs(away).max() > 10 * near:
            blend = plainest(float(np.sum((factor - 1) * away) / np.sum(away * away)), near / np.abs(away).max())[0]
            if _short(blend):
                yield replace(plain, blend=blend, low=-np.inf)
        if (factor > 0).all() and (ratio > 0).all() and np.abs(np.log(ratio)).max() > 10 * near:
            logs = np.log(ratio)
            power = plainest(float(np.sum(np.log(factor) * logs) / np.sum(logs * logs)), near / np.abs(logs).max())[0]
            if _short(power):
                yield replace(plain, power=power)
        size = MEASURES[measure](mixed, GROUPS[over])
        eps = float(np.median(ratio * size / np.where(factor > 0, factor, np.inf) - size))
        if eps > 0 and _short(plainest(eps, 3 * near * float(size.max()))[0]):
            yield replace(plain, eps=plainest(eps, 3 * near * float(size.max()))[0], low=meant.low, high=meant.high)


def _short(value: float) -> bool:
    """Whether a number is one that people write: of two digits at most."""
    return float(f"{value:.1e}") == value
