"""What a port may do instead that no law reads: said beforehand, by kind of part."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from parity.hypotheses import Hypothesis
from parity.hypotheses.base import Transform
from parity.laws.modulation import normed_anew
from parity.laws.numbers import told
from parity.pairs.attending import halves, neighbours, turn
from parity.pairs.names import distance, relative
from parity.pairs.norms import layer_norm
from parity.tensors.rounding import rounded

if TYPE_CHECKING:
    from parity.pairs.probe import PairProbe


def _passed(site: "PairProbe", array: np.ndarray) -> np.ndarray | None:
    x = site.part.inputs.get("x")
    return x if x is not None and x.shape == array.shape and site.part.kind in ("linear", "norm") else None


def _beside(site: "PairProbe", array: np.ndarray) -> np.ndarray | None:
    x = _passed(site, array)
    return None if x is None else array + x


def _turned(
    at: Callable[[np.ndarray], np.ndarray] | None = None,
    pairs: Callable[[int], np.ndarray] | None = None,
    channels: int | None = None,
) -> Transform:
    """Turned by other positions, which one token alone does not tell from another base, in other pairs of channels, or
    in another number of them."""

    def transform(site: "PairProbe", array: np.ndarray) -> np.ndarray | None:
        if site.part.kind != "rotary":
            return None
        inputs, facts = site.part.inputs, site.part.facts
        whole, order, ids, theta = inputs["whole"], facts["order"], inputs.get("position_ids"), facts.get("theta")
        own = halves if order[-1] - order[-2] == 1 else neighbours
        count = channels or len(order)
        if count > whole.shape[-1] or channels == len(order) or pairs is own:
            return None
        cos, sin = inputs["cos"], inputs["sin"]
        if at or channels:
            if ids is None or theta is None or at and np.array_equal(at(ids[0]), ids[0]):
                return None
            angles = np.multiply.outer(at(ids[0]) if at else ids[0], theta ** (-np.arange(count // 2) / (count // 2)))
            cos, sin = np.cos(angles), np.sin(angles)
        chosen = (pairs or own)(count)
        made = whole.astype(np.float64)
        made[..., chosen] = turn(whole[..., chosen], cos, sin)
        return made[..., order].astype(np.float32)

    return transform


def _exchanged(site: "PairProbe", array: np.ndarray) -> np.ndarray | None:
    """The activation is of what it should be multiplied with."""
    from parity.laws.curves import FUNCTIONS

    inputs, facts = site.part.inputs, site.part.facts
    if site.part.kind != "gated" or "up" not in inputs:
        return None
    f = FUNCTIONS[facts["activation"]]
    return (f(inputs["up"].astype(np.float64)) * inputs["gate"]).astype(np.float32)


def _narrow(*rounded_too: str) -> Transform:
    """A norm of which the weight, which is added to 1 or kept wider than the rest, or what is normed is rounded."""

    def transform(site: "PairProbe", array: np.ndarray) -> np.ndarray | None:
        x, weight = site.part.inputs.get("x"), site.part.facts.get("weight")
        if site.part.kind != "norm" or site.dtype != "bfloat16":
            return None
        wide = x.astype(np.float64)
        normed = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + site.part.facts["eps"])
        weight = rounded(weight, "bfloat16") if "weight" in rounded_too else weight
        return rounded((rounded(normed, "bfloat16") if "normed" in rounded_too else normed) * weight, "bfloat16")

    return transform


def _layer_norm(**changed: object) -> Transform:
    """A layer norm with another eps, without its weight or bias, or that leaves the mean where it is."""

    def transform(site: "PairProbe", array: np.ndarray) -> np.ndarray | None:
        if site.part.kind == "modulated" and changed.keys() <= {"eps", "mean"}:
            return normed_anew(site.part.inputs, site.part.facts, array, **changed)
        if site.part.kind != "layer_norm" or changed.get("eps") == site.part.facts["eps"]:
            return None
        return layer_norm(site.part.inputs["x"], **{**site.part.facts, **changed}).astype(np.float32)

    return transform


def _over_places(site: "PairProbe", array: np.ndarray) -> np.ndarray | None:
    """A layer norm that takes the mean and deviation of each channel, of all places."""
    facts = site.part.facts
    if site.part.kind != "layer_norm" or "groups" in facts:
        return None
    return layer_norm(site.part.inputs["x"], **facts, groups=len(facts["weight"])).astype(np.float32)


def _heads_as_tokens(site: "PairProbe", array: np.ndarray) -> np.ndarray | None:
    """Heads [heads, tokens, channels] that were put behind each other as if they were [tokens, heads, channels]."""
    if site.part.kind != "attention" or array.ndim != 2:
        return None
    heads = site.part.inputs["q"].shape[1]
    return array.reshape(len(array), heads, -1).swapaxes(0, 1).reshape(array.shape)


def _groups(change: Callable[[int], int]) -> Transform:
    """A group norm of other groups."""

    def transform(site: "PairProbe", array: np.ndarray) -> np.ndarray | None:
        facts = site.part.facts
        groups = change(facts["groups"]) if site.part.kind == "layer_norm" and "groups" in facts else 0
        if not groups or groups == facts["groups"] or len(facts["weight"]) % groups:
            return None
        return layer_norm(site.part.inputs["x"], **{**facts, "groups": groups}).astype(np.float32)

    return transform


def _border(pads: Callable[[Sequence], Sequence] = tuple, mode: str = "constant") -> Transform:
    """A border on another side, or of other values."""

    def transform(site: "PairProbe", array: np.ndarray) -> np.ndarray | None:
        if site.part.kind != "bordered":
            return None
        return np.pad(site.part.inputs["x"], pads(site.part.facts["pads"]), mode=mode)

    return transform


LAYER_NORMS = {
    "the mean is not subtracted": {"mean": False},
    "the bias is missing": {"bias": 0.0},
    "the weight is missing": {"weight": 1.0},
    "weight and bias are missing": {"weight": 1.0, "bias": 0.0},
    "the mean is not subtracted, and the bias is missing": {"mean": False, "bias": 0.0},
    "the variance is that of a sample, over one less": {"less": 1},
} | {f"eps is {told(eps)}": {"eps": eps} for eps in (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1)}

HYPOTHESES = (
    *(Hypothesis(says, ("*",), transform=_layer_norm(**changed), anew=True) for says, changed in LAYER_NORMS.items()),
    Hypothesis("each channel is normed over all places", ("*",), transform=_over_places, anew=True),
    Hypothesis("the part is left out", ("*",), transform=_passed, anew=True),
    Hypothesis("the part's input is added to its result", ("*",), transform=_beside),
    Hypothesis("neighbouring channels are turned together", ("*",), transform=_turned(pairs=neighbours), anew=True),
    Hypothesis("channels half of them apart are turned together", ("*",), transform=_turned(pairs=halves), anew=True),
    Hypothesis("positions are off by +1", ("*",), transform=_turned(lambda ids: ids + 1), anew=True),
    Hypothesis("positions are off by -1", ("*",), transform=_turned(lambda ids: ids - 1), anew=True),
    *(
        Hypothesis(f"{count} channels are turned", ("*",), transform=_turned(channels=count), anew=True)
        for count in (4, 8, 16, 32, 64, 80, 96, 128, 256)
    ),
    Hypothesis("positions begin at 0", ("*",), transform=_turned(lambda ids: ids - ids[0]), anew=True),
    Hypothesis("the weight is rounded to bfloat16", ("*",), transform=_narrow("weight"), anew=True),
    Hypothesis("what is normed is rounded to bfloat16", ("*",), transform=_narrow("normed"), anew=True),
    Hypothesis(
        "what is normed and the weight are rounded to bfloat16",
        ("*",),
        transform=_narrow("normed", "weight"),
        anew=True,
    ),
    *(
        Hypothesis(f"there are {count} groups", ("*",), transform=_groups(lambda _, count=count: count), anew=True)
        for count in (1, 2, 4, 8, 16, 32, 64)
    ),
    Hypothesis("a group's channels lie apart", ("*",), transform=_groups(lambda groups: -groups), anew=True),
    Hypothesis(
        "the border is on the other side",
        ("*",),
        transform=_border(lambda pads: [(after, before) for before, after in pads]),
        anew=True,
    ),
    Hypothesis("the border holds the nearest values", ("*",), transform=_border(mode="edge"), anew=True),
    Hypothesis("the border is a mirror", ("*",), transform=_border(mode="reflect"), anew=True),
    Hypothesis(
        "heads are not put behind tokens before their channels are joined",
        ("*",),
        transform=_heads_as_tokens,
        anew=True,
    ),
    Hypothesis("gate and up are exchanged", ("*",), transform=_exchanged, anew=True),
)


def rewired(site: "PairProbe", results: Mapping[str, np.ndarray]) -> list[Hypothesis]:
    """That a place holds what another part makes or reads, of those that come near to what is there."""

    def instead(said: str) -> Hypothesis:
        def transform(other: "PairProbe", array: np.ndarray) -> np.ndarray | None:
            named = {relative(name, other.tap.name): name for name in other.results}
            return other.part.view(other.results[named[said]]) if said in named else None

        return Hypothesis(f"{said} is in its place", ("*",), transform=transform, anew=True)

    size = np.linalg.norm(site.got.astype(np.float64))
    near = [
        name
        for name, array in results.items()
        if np.linalg.norm(site.part.view(array).astype(np.float64) - site.got) <= site.near * size
    ]
    near.sort(key=lambda name: distance(name, site.tap.name))
    return [instead(said) for said in dict.fromkeys(relative(name, site.tap.name) for name in near)]
