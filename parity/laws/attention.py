"""Laws of attention: q [n, heads, d] over k, v [m, kv_heads, d] under a mask [n, m].

What a query sees and how its scores become weights is read from what was attended instead: which keys count, and how
often (parity.laws.seen), other keys and values, scores changed by one number, weights made otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from parity.laws.attending import Change, Scene, applied, heads_of, made, one_after_another, scene_of
from parity.laws.base import Component, Law, Matrices
from parity.laws.numbers import listed, snapped, told
from parity.laws.scoring import (
    BLOCKS,
    FAMILIES,
    STAGES,
    Family,
    added_to,
    by_keys,
    narrowed,
    of_another,
    of_key_heads,
    padded,
    quantized,
    rolled,
    rotated,
    scaled,
    sink,
    softmax_in,
    with_heads,
)
from parity.laws.seen import seen
from parity.laws.support import Span, affected, span_of

# What a law may leave of the residual, beneath another; how many are told, and on how many others are read.
LEFT_BENEATH, TOLD, BENEATH = 0.5, 3, 2
# How many heads there may be instead.
HEADS = (1, 2, 4, 8, 16, 32)
# Queries that fits are made on, and scores.
ROWS, SCORES = 128, 1 << 20
# Queries that one number is searched with, and what its roughest guess may leave for it to be.
FEW, PROMISING = 16, 0.6
Found = tuple[str, float, Change, Matrices | None]


def attention(component: Component, got: np.ndarray) -> Iterator[Law]:
    """What is attended to instead, and where."""
    scene = scene_of(component) if got.shape == component.own.shape and np.isfinite(got).all() else None
    if scene is None:
        return
    difference = got.astype(np.float64) - component.own
    residual, size = float(np.linalg.norm(difference)), float(np.linalg.norm(component.own))
    if residual <= max(component.rounding, 1e-6 * size):
        return
    more = heads_of(component, difference, scene)
    if more is None or more.shape != (*scene.q.shape[:2], scene.v.shape[-1]):
        return
    # Rounding as it is where the heads are: what stands behind them changes its size.
    rounding = max(component.rounding, 5e-7 * size) / residual * float(np.linalg.norm(more))
    fit = _fit_of(scene, more, rounding)
    read: list[tuple[float, Law]] = []
    beneath: list[tuple[float, Found]] = []
    whole = float(np.linalg.norm(fit.target - fit.plain))
    for make in (_inputs, _shapes, _heads, _added, seen, _quantized, _numbers, partial(_beneath, beneath)):
        for found in make(fit):
            law = fit.law(*found)
            if law is not None and law[0] <= LEFT_BENEATH * whole:
                read.append(law)
                beneath.append((law[0], found))
        if any(left <= fit.enough for left, _ in read):
            break
    read.sort(key=lambda item: (0, item[1].size) if item[0] <= fit.enough else (1, item[0]))
    yield from list({law.sentence: law for _, law in reversed(read)}.values())[: -TOLD - 1 : -1]


def _beneath(found: list[tuple[float, Found]], fit: "Fit") -> Iterator[Found]:
    """Two changes at once: what is read where something else is attended that leaves little."""
    for _, (first, size, change, figure) in sorted(found, key=lambda item: item[0])[:BENEATH]:
        scene = change(fit.scene)
        if not isinstance(scene, Scene):
            continue
        on_top = replace(fit, scene=scene)
        for make in (_shapes, _heads, _numbers):
            for second, more, other, drawn in make(on_top):
                both = one_after_another(change, other)
                yield f"{first}, and {second}", size + more + 1, both, drawn or figure


@dataclass(frozen=True, eq=False)
class Fit:
    """Some queries of a scene, what they attended [h, n, d], which heads and queries differ, and what is rounding."""

    scene: Scene
    target: np.ndarray
    heads: np.ndarray
    rows: np.ndarray
    all_rows: np.ndarray
    enough: float

    @cached_property
    def plain(self) -> np.ndarray:
        """What should have been attended."""
        return self.scene.attended()

    def law(self, sentence: str, size: float, change: Change, figure: Matrices | None) -> tuple[float, Law] | None:
        """A change as a law where it holds: everywhere, or only where something differs; and what it leaves."""
        new, plain = made(change, self.scene), self.plain
        if new is None or not np.isfinite(new).all():
            return None
        best: tuple[float, Law] | None = None
        heads, rows = span_of("head", self.heads), span_of("query", self.all_rows)
        for of_heads, of_rows in dict.fromkeys(((None, None), (heads, None), (None, rows), (heads, rows))):
            where = np.ones(new.shape[:2], bool)
            where &= self.heads[:, None] | (not of_heads)
            where &= self.rows | (not of_rows)
            left = float(np.linalg.norm(np.where(where[:, :, None], new, plain) - self.target))
            if best is None or left < 0.5 * best[0]:
                words = [span.told for span in (of_heads, of_rows) if span]
                limited = _limited(change, len(self.heads), of_heads, of_rows)
                best = left, Law(", ".join([sentence, *words]), size + len(words), applied(limited), figure)
            if left <= self.enough:
                break
        return best


def _limited(change: Change, count: int, heads: Span | None, rows: Span | None) -> Change:
    def limited(scene: Scene) -> np.ndarray | Scene | None:
        if heads is None and rows is None:
            return change(scene)
        new = made(change, scene)
        if new is None:
            return new
        where = np.ones(new.shape[:2], bool)
        if heads is not None:
            if count != len(new):
                return None
            where &= heads.of(count)[:, None]
        if rows is not None:
            where &= rows.of(int(scene.rows.max()) + 1)[scene.rows]
        return np.where(where[:, :, None], new, scene.attended())

    return limited


def _fit_of(scene: Scene, more: np.ndarray, rounding: float) -> Fit:
    heads, rows = affected(more, 0, rounding), affected(more, 1, rounding)
    h, n, m = *scene.q.shape[:2], len(scene.mask[0])
    count = max(min(ROWS, SCORES // max(h * m, 1)), 4)
    chosen = np.arange(n)
    if n > count:
        # Most of what differs, some of what does not.
        differ, agree = np.flatnonzero(rows), np.flatnonzero(~rows)
        agree = agree[:: max(-(-len(agree) // (count // 4)), 1)]
        differ = differ[:: max(-(-len(differ) // (count - len(agree))), 1)]
        chosen = np.sort(np.concatenate([differ, agree]))
    part = scene.only(chosen)
    target = part.attended() + more[:, chosen]
    return Fit(part, target, heads, rows[chosen], rows, 2 * rounding * (len(chosen) / n) ** 0.5)


def _inputs(fit: Fit) -> Iterator[Found]:
    """Other keys and values: of other layers, passes and rows, turned where they should not be."""
    scene, facts = fit.scene, fit.scene.facts
    first = int(scene.places.min()) if len(scene.places) else 0
    for name in facts.get("others", {}):
        for what, use_k, use_v in (("keys and values", 1, 1), ("keys", 1, 0), ("values", 0, 1)):
            yield f"{what} are those of {name}", 1 + 0.5 * (use_k + use_v == 1), of_another(name, use_k, use_v), None
    if facts.get("cos") is not None:
        for what in ("values", "keys", "queries"):
            for part in ("", " of this pass", " before this pass") if what != "queries" and first else ("",):
                for sign, way in ((1, "rotated" if what == "values" else "rotated twice"), (-1, "rotated back")):
                    yield f"{what}{part} are {way}", 1 + 0.5 * bool(part), rotated(what, part, sign), None
    for what, use_k, use_v in (("keys and values", 1, 1), ("keys", 1, 0), ("values", 0, 1)):
        for step in (1, -1):
            which = "before" if step > 0 else "after"
            yield f"{what} are those of the token {which}", 2, rolled(step, use_k, use_v), None
            if first:
                yield (
                    f"{what} of this pass are those of the token {which}",
                    2.5,
                    rolled(step, use_k, use_v, True),
                    None,
                )


def _shapes(fit: Fit) -> Iterator[Found]:
    """Weights that are made otherwise, without a number."""

    def unnormalised(scene: Scene) -> np.ndarray:
        top = np.where(scene.mask, scene.scores, -np.inf).max(-1, keepdims=True)
        return (np.exp(np.minimum(scene.scores - np.where(np.isfinite(top), top, 0), 0)) * scene.mask) @ scene.v

    def masked_after(scene: Scene) -> np.ndarray:
        return (replace(scene, mask=np.ones_like(scene.mask)).weights() * scene.mask) @ scene.v

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    yield "weights are not normalised", 1, unnormalised, None
    yield (
        "exponentials of the scores are not normalised",
        1,
        lambda s: (np.exp(np.minimum(s.scores, 80)) * s.mask) @ s.v,
        None,
    )
    yield "weights are the sigmoid of the scores", 1, lambda s: (s.mask / (1 + np.exp(-s.scores))) @ s.v, None
    yield "weights hidden by the mask are taken from the sum afterwards", 1, masked_after, None
    yield "queries and keys are of unit length", 1, lambda s: replace(s, q=unit(s.q), k=unit(s.k)), None
    yield "the softmax has one more score of 0", 1, sink(0.0), None
    for dtype in ("bfloat16", "float16", "TF32"):
        for stages in STAGES:
            size = 1 + 0.1 * (len(stages) - 1)
            yield f"{listed(stages)} are {dtype}", size, partial(narrowed, dtype=dtype, stages=stages), None
        yield f"the softmax is computed in {dtype}", 1, partial(softmax_in, dtype=dtype), None
    for count in HEADS:
        yield f"there are {count} heads instead of {len(fit.heads)}", 1, with_heads(count), None
    for side in BLOCKS:
        yield f"zeros behind the last key, up to a multiple of {side}, are seen too", 1, padded(side, False), None
        words = f"zeros behind the keys before this pass, up to a multiple of {side}, are seen too"
        yield words, 1, padded(side, True), None


def _quantized(fit: Fit) -> Iterator[Found]:
    """Queries, keys and values of fewer bits."""
    cached = len(fit.scene.places) > 0 and int(fit.scene.places.min()) > 0
    yield from ((words, size, change, None) for words, size, change in quantized(fit.scene.q.shape[-1], cached))


def _heads(fit: Fit) -> Iterator[Found]:
    """Heads that read the keys or the values of another key head."""
    scene, group = fit.scene, fit.scene.group
    own = np.arange(len(scene.q)) // group
    if own.max() == 0 or len(scene.q) * (own.max() + 1) > 512:
        return
    for what, use_k, use_v in (("keys and values", 1, 1), ("keys", 1, 0), ("values", 0, 1)):
        lefts = []
        for other in range(own.max() + 1):
            new = made(of_key_heads(np.full_like(own, other), use_k, use_v), scene)
            lefts.append(np.square(new - fit.target).sum((1, 2)))
        best = np.where(fit.heads, np.argmin(lefts, 0), own)
        if np.array_equal(best, own):
            continue
        moved = [f"head {i} reads {what} of key head {best[i]}" for i in np.flatnonzero(best != own)]
        if np.array_equal(best, np.arange(len(own)) % (own.max() + 1)):
            moved = [f"key heads are tiled instead of repeated for {what}"]
        elif len(set(best.tolist())) == 1:
            moved = [f"every head reads {what} of key head {best[0]}"]
        yield listed(moved), len(moved), of_key_heads(best, use_k, use_v), None


def _added(fit: Fit) -> Iterator[Found]:
    """What is added to the scores is not, or is another head's."""
    added = fit.scene.added
    if added is None:
        return
    yield "nothing is added to the scores", 1, lambda scene: replace(scene, added=None), None
    heads = len(added)
    if heads > 1:
        lefts = [
            np.square(made(added_to(np.full(heads, other)), fit.scene) - fit.target).sum((1, 2))
            for other in range(heads)
        ]
        best = np.where(fit.heads, np.argmin(lefts, 0), np.arange(heads))
        moved = [f"head {i} is added what is head {best[i]}'s" for i in np.flatnonzero(best != np.arange(heads))]
        if np.array_equal(best, np.arange(heads)[::-1]):
            moved = ["what is added to the scores of the heads is in reverse order"]
        if moved:
            yield listed(moved), len(moved), added_to(best), None


def _numbers(fit: Fit) -> Iterator[Found]:
    """Scores that one number changes, the same for all heads that differ or one for each."""
    differ = np.flatnonzero(fit.rows)
    few = differ[:: -(-len(differ) // FEW)]
    small = replace(fit, scene=fit.scene.only(few), target=fit.target[:, few], rows=fit.rows[few])
    whole = float(np.linalg.norm((small.target - small.scene.attended())[small.heads]))
    for sentence, family, grid, smooth, neutral in FAMILIES:
        lefts = np.stack([_by_head(small, family(np.float64(number))) for number in grid])
        value = float(grid[np.argmin(lefts[:, small.heads].sum(1))])
        if not smooth:
            words = sentence if value != 1 else sentence.replace("{} keys are", "key is")
            yield words.format(told(value)), 1, family(np.float64(value)), None
            continue
        rough = float(np.sqrt(lefts[:, small.heads].min(0).sum()))
        # What is a little off lies between numbers of the grid, of which the one that changes nothing leaves least.
        if not (rough <= PROMISING * whole or value == neutral):
            continue
        value = _refined(small, family, np.array(value), grid)
        least = _least(small, family, value)
        if least <= LEFT_BENEATH * whole:
            enough = max(0.5 * _share(small, fit), 1.05 * least)
            number = snapped(float(value), lambda c, f=family, most=enough: _least(small, f, c) <= most)
            yield _zero_keys(family, number) or sentence.format(told(number)), 1, family(np.float64(number)), None
            for words, change in by_keys(float(value), small.scene) if family is scaled else ():
                if float(_by_head(small, change)[small.heads].sum() ** 0.5) <= enough:
                    yield sentence.format(words), 1.5, change, None
                    break
        if small.heads.sum() > 1 and least > max(_share(small, fit), 0.05 * whole):
            yield from _each_head(small, fit, sentence, family, grid, lefts, whole)


def _zero_keys(family: Family, number: float) -> str:
    """As many keys and values of 0 add to the softmax what one score of the logarithm of their number adds: that said,
    where the number is a logarithm rather than one that somebody wrote."""
    count = round(np.exp(min(number, 20.0)))
    logarithm = count > 1 and abs(number - np.log(count)) < 5e-4 and told(number) != told(round(number, 1))
    return f"{count} more keys and values of 0 are seen" if family is sink and logarithm else ""


def _each_head(
    small: Fit, fit: Fit, sentence: str, family: Family, grid: np.ndarray, lefts: np.ndarray, whole: float
) -> Iterator[Found]:
    values = _refined(small, family, grid[np.argmin(lefts, 0)][:, None, None], grid)
    least = _by_head(small, family(values)) ** 0.5
    if not float(np.linalg.norm(least[small.heads])) <= 0.25 * whole:
        return
    enough = np.maximum(0.5 * _share(small, fit) / len(least) ** 0.5, 1.05 * least)
    for head in np.flatnonzero(small.heads):

        def good(number: float, head: int = head) -> bool:
            tried = values.copy()
            tried[head] = number
            return _by_head(small, family(tried))[head] ** 0.5 <= enough[head]

        values[head] = snapped(float(values[head, 0, 0]), good)
    words = [f"{told(values[head, 0, 0])} in head {head}" for head in np.flatnonzero(small.heads)]

    def change(scene: Scene) -> np.ndarray | None:
        return family(values)(scene) if len(scene.q) == len(values) else None

    yield sentence.format(listed(words)), len(words), change, None


def _share(small: Fit, fit: Fit) -> float:
    """What is rounding among the queries of a smaller fit."""
    return fit.enough * (len(small.rows) / len(fit.rows)) ** 0.5


def _by_head(fit: Fit, change: Change) -> np.ndarray:
    with np.errstate(all="ignore"):
        new = made(change, fit.scene)
        left = np.full(len(fit.heads), np.inf) if new is None else np.square(new - fit.target).sum((1, 2))
    return np.where(np.isfinite(left), left, np.inf)


def _least(fit: Fit, family: Family, value: np.ndarray | float) -> float:
    return float(_by_head(fit, family(np.float64(value)))[fit.heads].sum() ** 0.5)


def _refined(fit: Fit, family: Family, value: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The numbers near those of a grid that leave least, one for all heads or one for each."""
    order = np.sort(grid)
    places = np.searchsorted(order, value)
    low, high = order[np.maximum(places - 1, 0)], order[np.minimum(places + 1, len(order) - 1)]
    golden = (5**0.5 - 1) / 2

    def left(number: np.ndarray) -> np.ndarray:
        lefts = _by_head(fit, family(number))
        return lefts[:, None, None] if value.ndim else np.array(lefts[fit.heads].sum())

    for _ in range(20):
        one, two = high - golden * (high - low), low + golden * (high - low)
        nearer = left(one) < left(two)
        low, high = np.where(nearer, low, one), np.where(nearer, two, high)
    return (low + high) / 2
