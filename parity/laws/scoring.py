"""What attention computes instead: other keys and values, and scores that one number changes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from parity.laws.attending import Change, Scene
from parity.laws.numbers import listed
from parity.laws.rounding import Rounded, by_rows, grids, rounded_to

Family = Callable[[np.ndarray], Change]
"""The change that a number makes; given [h, 1, 1], a number for each head."""


def _turn(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * table
    return np.concatenate([z.real, z.imag], -1)


def of_another(name: str, use_k: int, use_v: int) -> Change:
    def change(scene: Scene) -> Scene | None:
        other = scene.facts.get("others", {}).get(name)
        if other is None:
            return None
        k, v = (np.repeat(x.astype(np.float64).swapaxes(0, 1), scene.group, 0) for x in other[:2])
        if len(k) != len(scene.k) or (not (use_k and use_v) and k.shape[1] != scene.k.shape[1]):
            return None
        mask = other[2][scene.rows]
        return replace(scene, k=k if use_k else scene.k, v=v if use_v else scene.v, mask=mask)

    return change


def rotated(what: str, part: str, sign: int) -> Change:
    def change(scene: Scene) -> Scene | None:
        cos, sin = scene.facts.get("cos"), scene.facts.get("sin")
        if cos is None:
            return None
        table = cos.astype(np.float64) + 1j * sign * sin
        if what == "queries":
            return replace(scene, q=_turn(scene.q, table[scene.places]))
        first = int(scene.facts["places"].min())
        own = np.arange(len(table)) >= first
        table = np.where((own if "of this" in part else ~own if part else np.ones_like(own))[:, None], table, 1)
        turned = {"values": {"v": scene.v}, "keys": {"k": scene.k}}[what]
        return replace(scene, **{name: _turn(x, table) for name, x in turned.items()})

    return change


def rolled(step: int, use_k: int, use_v: int, own: bool = False) -> Change:
    def change(scene: Scene) -> Scene:
        count, first = scene.k.shape[1], int(scene.facts["places"].min()) if own else 0
        order = np.concatenate([np.arange(first), np.roll(np.arange(first, count), step)])
        return replace(scene, k=scene.k[:, order] if use_k else scene.k, v=scene.v[:, order] if use_v else scene.v)

    return change


def of_key_heads(order: np.ndarray, use_k: int, use_v: int) -> Change:
    def change(scene: Scene) -> Scene | None:
        if len(order) != len(scene.k):
            return None
        which = order * scene.group
        return replace(scene, k=scene.k[which] if use_k else scene.k, v=scene.v[which] if use_v else scene.v)

    return change


def scaled(c: np.ndarray) -> Change:
    return lambda scene: scene.attended(scene.scores + (c - 1) * scene.products)


def added(c: np.ndarray) -> Change:
    """What is added to the scores, another number of times."""
    return lambda scene: None if scene.added is None else scene.attended(scene.scores + (c - 1) * scene.added)


def added_to(order: np.ndarray) -> Change:
    """What is added to the scores of the heads, in another order of those."""

    def change(scene: Scene) -> Scene | None:
        if scene.added is None or len(order) != len(scene.added):
            return None
        return replace(scene, added=scene.added[order])

    return change


def larger(c: np.ndarray) -> Change:
    return lambda scene: c * scene.attended()


def capped(c: np.ndarray) -> Change:
    return lambda scene: scene.attended(c * np.tanh(scene.scores / c))


def clipped(c: np.ndarray) -> Change:
    return lambda scene: scene.attended(np.clip(scene.scores, -c, c))


def limited_above(c: np.ndarray) -> Change:
    return lambda scene: scene.attended(np.minimum(scene.scores, c))


def sink(c: np.ndarray | float) -> Change:
    def change(scene: Scene) -> np.ndarray:
        total = (np.exp(np.minimum(scene.scores, 80)) * scene.mask).sum(-1, keepdims=True)
        return scene.attended() * total / (total + np.exp(c))

    return change


def biased(c: np.ndarray) -> Change:
    def change(scene: Scene) -> np.ndarray:
        apart = np.abs(scene.places[:, None] - np.arange(scene.mask.shape[1]))
        return scene.attended(scene.scores - c * apart)

    return change


def highest(c: np.ndarray) -> Change:
    def change(scene: Scene) -> np.ndarray:
        scores = np.where(scene.mask, scene.scores, -np.inf)
        count = int(np.clip(np.ravel(c)[0], 1, scores.shape[-1]))
        least = np.partition(scores, -count, -1)[..., -count, None]
        return scene.attended(np.where(scores >= least, scores, -np.inf))

    return change


def window(c: np.ndarray) -> Change:
    return _hidden(lambda scene, key: scene.places[:, None] - key > c)


def without_first(c: np.ndarray) -> Change:
    return _hidden(lambda scene, key: np.broadcast_to(key < c, scene.mask.shape))


def without_last(c: np.ndarray) -> Change:
    return _hidden(lambda scene, key: np.broadcast_to(key >= scene.mask.shape[1] - c, scene.mask.shape))


def narrowed(scene: Scene, dtype: str, stages: Sequence[str]) -> np.ndarray:
    """Attention of which some stages are rounded."""
    parts = {name[0]: rounded_to(dtype, getattr(scene, name[0])) for name in stages if hasattr(scene, name[0])}
    scene = replace(scene, **parts)
    scores = rounded_to(dtype, scene.scores) if "scores" in stages else scene.scores
    weights = scene.weights(scores)
    attended = (rounded_to(dtype, weights) if "weights" in stages else weights) @ scene.v
    return rounded_to(dtype, attended) if "results" in stages else attended


def quantized(width: int, cached: bool) -> Iterator[tuple[str, float, Change]]:
    """Ways to quantize heads of a width, those of each token by themselves: words, size, change.

    `cached`: also of the keys and values before this pass alone.
    """
    for words, size, rounded in grids(width):
        if not words.startswith(ROUGHER) or not by_rows(words):
            continue
        said = words.removeprefix("is ").replace(" row by row", " token by token")
        for stages in ROUGH:
            more = size + 0.1 * len(stages)
            yield f"{listed(stages)} are {said}", more, _rougher(rounded, stages, False)
            if cached and "queries" not in stages:
                yield f"{listed(stages)} before this pass are {said}", more + 0.5, _rougher(rounded, stages, True)


def _rougher(rounded: Rounded, stages: Sequence[str], cached: bool) -> Change:
    def change(scene: Scene) -> Scene:
        before = np.arange(scene.k.shape[1])[:, None] < (int(scene.facts["places"].min()) if cached else np.inf)
        parts = {name[0]: rounded(getattr(scene, name[0])) for name in stages}
        kept = {name: x if name == "q" else np.where(before, x, getattr(scene, name)) for name, x in parts.items()}
        return replace(scene, **kept)

    return change


def softmax_in(scene: Scene, dtype: str) -> np.ndarray:
    """Attention whose softmax rounds every operation, its sum key by key."""

    def narrow(x: np.ndarray) -> np.ndarray:
        return rounded_to(dtype, x)

    scores = np.where(scene.mask, narrow(scene.scores), -np.inf)
    top = scores.max(-1, keepdims=True)
    powers = np.exp(narrow(np.where(scene.mask, scores - np.where(np.isfinite(top), top, 0), -np.inf)))
    powers, total = narrow(powers), np.zeros((*powers.shape[:2], 1))
    for key in range(powers.shape[2]):
        total = narrow(total + powers[:, :, key, None])
    return narrow(powers * narrow(1 / np.maximum(total, 1e-30))) @ scene.v


def with_heads(count: int) -> Change:
    """As many heads as that, each of its part of the channels."""

    def change(scene: Scene) -> np.ndarray | None:
        heads, _, size = scene.q.shape
        if scene.added is not None or scene.group > 1 or heads == count:
            return None
        if heads * size % count or scene.v.shape[2] != size:
            return None

        def split(x: np.ndarray, into: int) -> np.ndarray:
            rows = x.swapaxes(0, 1).reshape(x.shape[1], into, -1)
            return rows.swapaxes(0, 1)

        scale = scene.scale * (count / heads) ** 0.5
        parts = {name: split(getattr(scene, name), count) for name in "qkv"}
        return split(replace(scene, scale=scale, **parts).attended(), heads)

    return change


def padded(side: int, cached: bool) -> Change:
    """Keys and values of 0 up to a whole number of blocks, of all keys or of those before this pass: they add exp(0)
    each to what weights are divided by."""

    def change(scene: Scene) -> np.ndarray:
        keys = int(scene.facts.get("places", scene.places).min()) if cached else scene.mask.shape[1]
        return sink(np.log(-keys % side))(scene) if -keys % side else scene.attended()

    return change


def by_keys(number: float, scene: Scene) -> Iterator[tuple[str, Change]]:
    """Scores times a number that is made of how many keys there are, with another that people write."""
    for name, of, back in COUNTED:
        base = back(of(scene.mask.shape[1]) / number) if number > 0 else 0.0
        if not 8 <= base < 1e7:
            continue
        for written in dict.fromkeys((2 ** round(np.log2(base)), round(float(f"{base:.0e}")), round(base))):
            words = f"{name.format('number of keys')} / {name.format(written)}"
            yield words, lambda scene, of=of, written=written: (
                scaled(np.float64(of(scene.mask.shape[1]) / of(written)))(scene))  # fmt: skip


def _hidden(which: Callable[[Scene, np.ndarray], np.ndarray]) -> Change:
    def change(scene: Scene) -> Scene:
        mask = scene.mask & ~which(scene, np.arange(scene.mask.shape[1]))
        return replace(scene, mask=np.where(mask.any(-1, keepdims=True), mask, scene.mask))

    return change


STAGES = (("scores",), ("weights",), ("values",), ("keys",), ("queries",), ("scores", "weights"), ("queries", "keys"),
          ("queries", "keys", "values"), ("queries", "keys", "scores", "weights"),
          ("queries", "keys", "values", "scores", "weights", "results"))  # fmt: skip
"""What may be rounded together."""
ROUGHER = ("is quantized to 8 bits", "is quantized to 4 bits", "is rounded to float8")
"""Ways to quantize that are tried."""
ROUGH = (("queries", "keys"), ("keys", "values"), ("keys",), ("values",), ("queries",), ("queries", "keys", "values"))
"""What may be quantized together."""
BLOCKS = (8, 16, 32, 64, 128, 256)
COUNTED = (
    ("ln({})", np.log, lambda x: np.exp(min(x, 99.0))),
    ("sqrt({})", np.sqrt, np.square),
)
"""What is made of a number of keys, in words, and its inverse."""
_LOG = np.geomspace(1 / 64, 64, 25)


_COUNTS = np.array([*range(1, 17), 20, 24, 31, 32, 40, 47, 48, 50, 63, 64, 96, 99, 100, 127, 128, 255, 256], float)


FAMILIES: tuple[tuple[str, Family, np.ndarray, bool, float | None], ...] = (
    ("what is attended is {} times as large", larger, np.array([-1, 0, 0.5, 1, 1.5, 2, 4]), True, 1),
    ("scores are {} times as large", scaled, np.concatenate([-_LOG[4:-4:4], [0.0], _LOG, np.geomspace(0.55, 1.8, 13)]),
     True, 1),
    ("what is added to the scores is {} times as large", added, np.array([-1, 0, 0.25, 0.5, 1, 1.5, 2, 4, 8]), True, 1),
    ("scores are capped at {} by tanh", capped, np.geomspace(0.1, 128, 22), True, None),
    ("scores are clipped to +-{}", clipped, np.geomspace(0.1, 64, 22), True, None),
    ("scores are at most {}", limited_above, np.linspace(-2, 16, 19), True, None),
    ("the softmax has one more score of {}", sink, np.linspace(-8, 12, 21), True, None),
    ("scores fall by {} for every token between query and key", biased,
     np.concatenate([-np.geomspace(0.01, 1, 5), [0.0], np.geomspace(2**-10, 2, 23)]), True, 0),
    ("only the {} highest scores of a query count", highest, _COUNTS, False, None),
    ("keys more than {} tokens back are not seen", window, _COUNTS, False, None),
    ("the first {} keys are not seen", without_first, _COUNTS, False, None),
    ("the last {} keys are not seen", without_last, _COUNTS, False, None),
)  # fmt: skip
