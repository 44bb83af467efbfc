"""Attention as its laws see it: scores, weights and what comes of them, head by head, and what stands behind it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from parity.laws.base import Component

# Scores that are held at once, and numbers that a fit is given.
SCORES = 1 << 21
# A projection with a larger condition number says too little of what it is given.
CONDITION = 1e4


@dataclass(frozen=True, eq=False)
class Scene:
    """q [h, n, d]; k, v [h, m, d], a group's keys once for each of its heads; mask [n, m]; what is known of the tokens.

    Attributes:
        scale: what q k^T is multiplied by.
        rows: which queries of the component these are, [n].
        places: which key each query is, [n].
        labels: of each key, by name: its segment, its frame, ...; -1 for none.
        group: how many heads share a key head.
        counts: how often each key counts, [n, m]; None for once.
        added: what is added to the scores, [h or 1, n, m]; None for nothing.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mask: np.ndarray
    scale: float
    rows: np.ndarray
    places: np.ndarray
    labels: Mapping[str, np.ndarray]
    group: int
    facts: Mapping[str, object] = field(repr=False)
    counts: np.ndarray | None = None
    added: np.ndarray | None = None

    @cached_property
    def products(self) -> np.ndarray:
        """q k^T times the scale, [h, n, m]; also of keys that are not seen."""
        return self.q @ self.k.swapaxes(1, 2) * self.scale

    @cached_property
    def scores(self) -> np.ndarray:
        """The products and what is added to them."""
        return self.products if self.added is None else self.products + self.added

    def weights(self, scores: np.ndarray | None = None) -> np.ndarray:
        """The softmax of scores under the mask, [h, n, m]; zeros for a query that sees nothing."""
        seen = np.where(self.mask, self.scores if scores is None else scores, -np.inf)
        top = seen.max(-1, keepdims=True)
        weights = np.exp(seen - np.where(np.isfinite(top), top, 0))
        if self.counts is not None:
            weights = weights * self.counts
        return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)

    def attended(self, scores: np.ndarray | None = None) -> np.ndarray:
        """[h, n, d]."""
        return self.weights(scores) @ self.v

    def only(self, rows: np.ndarray) -> "Scene":
        """Some of the queries."""
        counts = None if self.counts is None else self.counts[rows]
        added = None if self.added is None else self.added[:, rows]
        return replace(
            self, q=self.q[:, rows], mask=self.mask[rows], rows=self.rows[rows], places=self.places[rows],
            counts=counts, added=added,
        )  # fmt: skip

    def pieces(self) -> list["Scene"]:
        """The queries in runs whose scores are not too many to be held."""
        run = max(SCORES // max(len(self.q) * self.mask.shape[1], 1), 1)
        count = self.mask.shape[0]
        return [self.only(np.arange(start, min(start + run, count))) for start in range(0, count, run)]


Change = Callable[[Scene], "np.ndarray | Scene | None"]
"""What comes out instead, [h, n, d], or what is attended instead; None where the law says nothing."""


def made(change: Change, scene: Scene) -> np.ndarray | None:
    """What comes out under a change, [h, n, d]."""
    new = change(scene)
    return new.attended() if isinstance(new, Scene) else new


def one_after_another(first: Change, second: Change) -> Change:
    """A change of what another makes of a scene."""

    def change(scene: Scene) -> np.ndarray | Scene | None:
        new = first(scene)
        return second(new) if isinstance(new, Scene) else None

    return change


def scene_of(component: Component) -> Scene | None:
    """A component's attention; None where it has none, or none that can be computed."""
    parts = [component.inputs.get(name) for name in ("q", "k", "v", "mask")]
    if any(part is None or not part.size for part in parts):
        return None
    q, k, v, mask = parts
    n, heads, _ = q.shape
    if len(k) != len(v) or mask.shape != (n, len(k)) or heads % k.shape[1] or not np.isfinite(component.own).all():
        return None
    group = heads // k.shape[1]
    q, k, v = (x.astype(np.float64).swapaxes(0, 1) for x in (q, k, v))
    facts = component.facts
    scale = float(facts.get("scale", q.shape[-1] ** -0.5))
    places = facts.get("places", np.arange(len(mask[0]) - n, len(mask[0])))
    k, v = (np.repeat(x, group, 0) for x in (k, v))
    added = component.inputs.get("added")
    added = None if added is None else added.astype(np.float64)
    return Scene(q, k, v, mask, scale, np.arange(n), places, facts.get("labels", {}), group, facts, added=added)


def result_of(component: Component, heads: np.ndarray) -> np.ndarray:
    """The part of a result in its own shape that comes of what the heads attend, [h, n, d], without any bias."""
    rows = heads.swapaxes(0, 1).reshape(heads.shape[1], -1)
    weight = component.facts.get("weight")
    if weight is not None:
        rows = rows @ weight.astype(np.float64).T
    if component.own.ndim == 5:
        rows = rows.T
    return rows.reshape(component.own.shape)


def heads_of(component: Component, difference: np.ndarray, scene: Scene) -> np.ndarray | None:
    """What the heads must have attended more, [h, n, d], for a result to differ so; None where that is not told."""
    rows = (
        difference.reshape(difference.shape[1], -1).T
        if difference.ndim == 5
        else difference.reshape(len(difference), -1)
    )
    weight = component.facts.get("weight")
    if weight is not None:
        if weight.shape[0] < weight.shape[1] or np.linalg.cond(weight) > CONDITION:
            return None
        rows = np.linalg.lstsq(weight.astype(np.float64), rows.T, rcond=None)[0].T
    heads, n, _ = scene.q.shape
    return rows.reshape(n, heads, -1).swapaxes(0, 1)


def applied(change: Change) -> Callable[[Component], np.ndarray | None]:
    """A change as what a law computes: the difference that it makes is added to what is there."""

    def apply(component: Component) -> np.ndarray | None:
        scene = scene_of(component)
        if scene is None:
            return None
        more = []
        for piece in scene.pieces():
            new = made(change, piece)
            if new is None:
                return None
            more.append(new - piece.attended())
        return (component.own + result_of(component, np.concatenate(more, 1))).astype(np.float32)

    return apply
