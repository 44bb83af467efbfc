"""Which keys count for which queries, and how often, read from what was attended.

If key j counts 1 + x_ij times for query i, with weights e_ij before, the result G_i of what was O_i obeys
G_i - O_i = sum_j x_ij e_ij (v_j - G_i), which is linear in x. Keys, distances or pairs of labels have one x each.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from parity.laws.attending import Change, Scene
from parity.laws.base import Matrices
from parity.laws.masks import Counts, Told, at_distance, known_masks, within
from parity.laws.numbers import listed, told
from parity.laws.support import spans

if TYPE_CHECKING:
    from parity.laws.attention import Fit

Found = tuple[str, float, Change, Matrices | None]
# Numbers that a system of equations may have, its unknowns, and how certain a count has to be to be told.
NUMBERS, UNKNOWN, CERTAIN = 1 << 24, 1536, 0.2


def seen(fit: "Fit") -> Iterator[Found]:
    """Keys that do not count, that count twice, or that should not be seen."""
    scene = fit.scene
    for words, size, counts in known_masks(scene):
        yield words, size, counted(counts), _figure(scene, counts)
    system = _System(fit)
    for make in (_keys, _distances, _pairs):
        for words, size, counts in make(system, scene):
            yield words, size, counted(counts), _figure(scene, counts)
    yield from _values(fit)


def counted(counts: Counts) -> Change:
    """Attention in which keys count so often; a query that would see nothing sees what it should."""

    def change(scene: Scene) -> Scene | None:
        times = counts(scene)
        if times is None:
            return None
        times = np.where((times > 0).any(-1, keepdims=True), times, scene.mask)
        return replace(scene, mask=times > 0, counts=times)

    return change


def _figure(scene: Scene, counts: Counts) -> Matrices | None:
    found = counts(scene)
    if found is None:
        return None
    panels = {"expected": scene.mask.astype(float), "found": found.astype(float)}
    return Matrices("How often keys count", "query", "key", panels)


class _System:
    """The equations of a fit, class by class of pairs of query and key."""

    def __init__(self, fit: "Fit") -> None:
        scene, target = fit.scene, fit.target
        h, n, m = len(scene.q), len(scene.places), scene.mask.shape[1]
        rows = np.flatnonzero(fit.rows)
        rows = rows[:: max(-(-len(rows) * h * m * target.shape[-1] // NUMBERS), 1)]
        self.scene, self.heads, self.n = scene.only(rows), fit.heads, n
        scores = self.scene.scores
        hidden = np.where(self.scene.mask, scores, -np.inf)
        top = hidden.max(-1, keepdims=True)
        top = np.where(np.isfinite(top), top, 0)
        total = np.maximum(np.exp(hidden - top).sum(-1, keepdims=True), 1e-300)
        self.weights = (np.exp(np.minimum(scores - top, 30)) / total)[fit.heads]
        self.target = target[:, rows][fit.heads]
        self.values = self.scene.v[fit.heads]
        self.right = self.target - self.scene.attended()[fit.heads]
        # A hidden key may weigh more than all that is seen: no query is to count more for it.
        largest = np.maximum(self.weights.sum(-1, keepdims=True), 1)
        self.weights, self.right = self.weights / largest, self.right / largest
        self.noise = fit.enough / max(target.size, 1) ** 0.5 / 2

    def solve(self, classes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """x of each class of pairs [n, m] (-1 for none), and which are certain."""
        square, right = np.zeros((count, count)), np.zeros(count)
        for i, row in enumerate(classes):
            held = np.flatnonzero(row >= 0)
            used, inverse = np.unique(row[held], return_inverse=True)
            one = np.zeros((len(held), len(used)))
            one[np.arange(len(held)), inverse] = 1
            apart = self.weights[:, i, held, None] * (self.values[:, held] - self.target[:, i, None])
            columns = np.einsum("hmd,mc->hdc", apart, one, optimize=True).reshape(-1, len(used))
            square[np.ix_(used, used)] += columns.T @ columns
            right[used] += columns.T @ self.right[:, i].ravel()
        scale = np.sqrt(np.maximum(np.diag(square), 1e-300))
        scaled = square / np.outer(scale, scale)
        inverse = np.linalg.pinv(scaled + 1e-10 * np.eye(count), hermitian=True)
        x = inverse @ (right / scale) / scale
        doubt = np.sqrt(np.maximum(np.diag(inverse), 0)) * self.noise / scale
        return x, (doubt < CERTAIN) & (scale > 1e-140)

    def counts(self, classes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """How often each class counts that is seen, and each that is not; 1 and 0 where that is not certain."""
        mask = self.scene.mask
        if 2 * count > UNKNOWN:
            return np.ones(count), np.zeros(count)
        x, certain = self.solve(np.where(classes < 0, -1, classes + np.where(mask, 0, count)), 2 * count)
        whole = np.where(certain, np.round(x), 0)
        # What is no whole number of times is none that was counted.
        whole = np.where(np.abs(x - whole) < 0.45, whole, 0)
        return np.clip(1 + whole[:count], 0, 9), np.clip(whole[count:], 0, 9)


def _keys(system: _System, scene: Scene) -> Iterator[Told]:
    """Keys that count otherwise for all queries."""
    m = scene.mask.shape[1]
    known, hidden = system.counts(np.broadcast_to(np.arange(m), system.scene.mask.shape), m)
    for times, also in ((known, hidden), (known, np.zeros(m))):
        changed = [(value, times == value) for value in np.unique(times[times != 1])]
        more = also > 0
        if not changed and not more.any():
            continue
        words = [f"{_key(where, scene)} {_times(value, where.sum() > 1)}" for value, where in changed]
        if more.any():
            words.append(f"{_key(more, scene)} {'are' if more.sum() > 1 else 'is'} seen by all")
        if len(words) <= 4 and not any(" of " in word for word in words):
            size = sum(_runs(where) for _, where in changed) + (_runs(more) if more.any() else 0)
            yield listed(words), size, _by_key(changed, more, scene)


def _by_key(changed: list[tuple[float, np.ndarray]], more: np.ndarray, fitted: Scene) -> Counts:
    rules = [(value, _keys_like(where, fitted)) for value, where in changed]
    added = _keys_like(more, fitted)

    def counts(scene: Scene) -> np.ndarray:
        times = scene.mask.astype(float)
        for value, like in rules:
            times = np.where(like(scene) & scene.mask, value, times)
        return np.where(added(scene) & ~scene.mask, 1.0, times) if more.any() else times

    return counts


def _keys_like(where: np.ndarray, fitted: Scene) -> Callable[[Scene], np.ndarray]:
    """The same keys of another scene: counted from the end or from this pass where they are told so."""
    chosen, m, first = np.flatnonzero(where), len(where), int(fitted.facts.get("places", fitted.places).min())
    base: Callable[[Scene], int] = lambda scene: 0  # noqa: E731
    if len(chosen) and chosen[0] and chosen[-1] == m - 1:
        base = lambda scene: scene.mask.shape[1] - m  # noqa: E731
    elif len(chosen) == 1 and first and abs(chosen[0] - first) <= 1:
        base = lambda scene: int(scene.facts.get("places", scene.places).min()) - first  # noqa: E731

    def like(scene: Scene) -> np.ndarray:
        found = np.zeros(scene.mask.shape[1], bool)
        moved = chosen + base(scene)
        found[moved[(moved >= 0) & (moved < len(found))]] = True
        return found

    return like


def _key(where: np.ndarray, scene: Scene) -> str:
    """Keys in words."""
    chosen, m = np.flatnonzero(where), len(where)
    first = int(scene.facts.get("places", scene.places).min())
    if len(chosen) == 1:
        names = {0: "the first key", m - 1: "the last key"}
        if first:
            names |= {first - 1: "the last key before this pass", first: "the first key of this pass"}
        return names.get(int(chosen[0]), f"key {chosen[0]}")
    if chosen[-1] - chosen[0] + 1 == len(chosen) < m:
        if not chosen[0]:
            return f"the first {len(chosen)} keys"
        if chosen[-1] == m - 1:
            return f"the last {len(chosen)} keys"
    return spans("key", where)[0].those if len(chosen) < m else "all keys"


def _times(value: float, many: bool) -> str:
    if not value:
        return "are not seen" if many else "is not seen"
    return f"{'count' if many else 'counts'} {'twice' if value == 2 else f'{told(value)} times'}"


def _runs(where: np.ndarray) -> int:
    """How many runs of neighbours are chosen."""
    return int((np.diff(where.astype(int), prepend=0) == 1).sum())


def _distances(system: _System, scene: Scene) -> Iterator[Told]:
    """Keys by how far back they are."""
    m = scene.mask.shape[1]
    back = scene.places[:, None] - np.arange(m)
    low = int(back.min())
    count = int(back.max()) - low + 1
    known, hidden = system.counts(system.scene.places[:, None] - np.arange(m) - low, count)
    distance = np.arange(count) + low
    gone, more = distance[known == 0], distance[hidden > 0]
    edges: list[tuple[str, Counts]] = []
    for window in _edges(gone[gone > 0], distance[(known > 0) & (distance > 0)]):
        edges.append((f"keys more than {window - 1} tokens back are not seen", within(back_less=window)))
        edges.append((f"keys {window} tokens away and more are not seen", within(back_less=window, ahead_less=window)))
    for window in _edges(-gone[gone < 0], -distance[(known > 0) & (distance < 0)]):
        if window > 1:
            edges.append((f"keys more than {window - 1} tokens ahead are not seen", within(ahead_less=window)))
    if len(more[more < 0]):
        reach = int(-more.min())
        edges.append(
            (f"a query also sees {'the key' if reach == 1 else f'{reach} keys'} after it", within(ahead=reach))
        )
    if 0 in gone:
        edges.append(
            ("a query does not see itself", lambda s: s.mask & (s.places[:, None] != np.arange(s.mask.shape[1])))
        )
    yield from ((words, 1, counts) for words, counts in edges)
    for value in np.unique(known[known > 1]):
        at = distance[known == value]
        if len(at) <= 2:
            words = " and ".join("itself" if not d else f"{d} tokens back" if d > 0 else f"{-d} ahead" for d in at)
            yield f"the key {words} {_times(value, False)}", len(at), at_distance(at, value)


def _edges(gone: np.ndarray, kept: np.ndarray) -> list[int]:
    """Where a window may end: at the first distance that is gone, or after the last that is kept."""
    return (
        sorted({int(gone.min()), int(gone.max())} | ({int(kept.max()) + 1} if len(kept) else set()))
        if len(gone)
        else []
    )


def _pairs(system: _System, scene: Scene) -> Iterator[Told]:
    """Keys of one label for queries of another."""
    for name, labels in scene.labels.items():
        values = np.unique(labels)
        if not 1 < len(values) <= 24:
            continue
        number = np.searchsorted(values, labels)
        classes = number[system.scene.places][:, None] * len(values) + number
        known, hidden = system.counts(classes, len(values) ** 2)
        changed = [(i, known[i]) for i in np.flatnonzero(known != 1)] + [(i, None) for i in np.flatnonzero(hidden)]
        if not changed or len(changed) > 6:
            continue
        words, rules = [], []
        for i, value in changed:
            query, key = values[i // len(values)], values[i % len(values)]
            rules.append((query, key, value))
            said = "are seen" if value is None else _times(value, True)
            words.append(f"keys of {_label(name, key)} {said} from {_label(name, query)}")

        def counts(scene: Scene, name: str = name, rules: list = rules) -> np.ndarray | None:
            labels = scene.labels.get(name)
            if labels is None:
                return None
            times = scene.mask.astype(float)
            for query, key, value in rules:
                pair = (labels[scene.places] == query)[:, None] & (labels == key)
                times = np.where(
                    pair & (~scene.mask if value is None else scene.mask), 1 if value is None else value, times
                )
            return times

        yield listed(words), len(words), counts


def _label(name: str, value: int) -> str:
    return f"no {name}" if value < 0 else f"{name} {value}"


def _values(fit: "Fit") -> Iterator[Found]:
    """Values that are larger or smaller by a factor: those of one key, or of one label."""
    scene = fit.scene
    weights = scene.weights()[fit.heads]
    right = (fit.target - scene.attended())[fit.heads]
    m = scene.mask.shape[1]
    for name, labels in (("key", np.arange(m)), *scene.labels.items()):
        values, number = np.unique(labels, return_inverse=True)
        if len(values) < 2 or len(values) * right.size > NUMBERS:
            continue
        columns = np.zeros((right.size, len(values)))
        for i in range(len(values)):
            of = number == i
            columns[:, i] = (weights[:, :, of] @ scene.v[fit.heads][:, of]).ravel()
        size = np.linalg.norm(columns, axis=0)
        gains = np.square(columns.T @ right.ravel()) / np.maximum(size, 1e-150) ** 2
        # The one whose values tell most, and all of them together.
        best = int(np.argmax(np.where(size > 0, gains, 0)))
        factor = 1 + float(columns[:, best] @ right.ravel()) / max(float(size[best]), 1e-150) ** 2
        factor = 0.0 if abs(factor) < 0.02 else float(f"{factor:.3g}")
        if name == "key":
            where = np.arange(m) == best
            words, like = f"the value of {_key(where, scene)}", _keys_like(where, scene)
        else:
            words = f"values of {_label(name, values[best])}"
            like = lambda scene, name=name, value=values[best]: scene.labels[name] == value  # noqa: E731
        says = f"{'is' if name == 'key' else 'are'} {f'{told(factor)} times as large' if factor else '0'}"
        yield f"{words} {says}", 2, _with_values(like, factor), None


def _with_values(like: Callable[[Scene], np.ndarray], factor: float) -> Change:
    def change(scene: Scene) -> Scene:
        return replace(scene, v=scene.v * np.where(like(scene), factor, 1.0)[:, None])

    return change
