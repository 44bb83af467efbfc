"""Masks that people make: how often each key counts for each query."""

from collections.abc import Callable, Iterator

import numpy as np

from parity.laws.attending import Scene

Counts = Callable[[Scene], np.ndarray | None]
"""How often each key counts for each query, [n, m]."""


Told = tuple[str, float, Counts]


def known_masks(scene: Scene) -> Iterator[Told]:
    """Masks that people make."""

    def places_of(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        return scene.places[:, None], np.arange(scene.mask.shape[1])[None]

    def causal(scene: Scene) -> np.ndarray:
        query, key = places_of(scene)
        return scene.mask & (key <= query)

    def alone(scene: Scene) -> np.ndarray:
        query, key = places_of(scene)
        return scene.mask & (key == query)

    def first(scene: Scene) -> np.ndarray:
        return scene.mask & (places_of(scene)[1] == 0)

    def own_pass(scene: Scene) -> np.ndarray:
        return scene.mask & (places_of(scene)[1] >= scene.facts["places"].min())

    yield "no key after the query is seen", 1, causal
    yield "every key is seen", 1, lambda scene: np.ones_like(scene.mask)
    yield "a query sees itself alone", 1, alone
    yield "the first key alone is seen", 1, first
    if "places" in scene.facts and scene.facts["places"].min() > 0:
        yield "no key before this pass is seen", 1, own_pass
    for name in scene.labels:
        for words, way in (
            (f"queries see the keys of their own {name} alone", lambda q, k, mask: mask & ((q < 0) | (q == k))),
            (f"queries see no other {name}", lambda q, k, mask: mask & ((q < 0) | (k < 0) | (q == k))),
            (f"queries see no later {name}", lambda q, k, mask: mask & ((q < 0) | (k < 0) | (k <= q))),
            (f"queries see no earlier {name}", lambda q, k, mask: mask & ((q < 0) | (k < 0) | (k >= q))),
            (f"queries see all of their own {name}", lambda q, k, mask: mask | ((q >= 0) & (q == k))),
            (f"queries see every {name}", lambda q, k, mask: mask | ((q >= 0) & (k >= 0))),
        ):

            def labelled(scene: Scene, name: str = name, way: Callable = way) -> np.ndarray | None:
                labels = scene.labels.get(name)
                return None if labels is None else way(labels[scene.places][:, None], labels[None], scene.mask)

            yield words, 1, labelled


def within(back_less: int | None = None, ahead_less: int | None = None, ahead: int | None = None) -> Counts:
    def counts(scene: Scene) -> np.ndarray:
        back, mask = scene.places[:, None] - np.arange(scene.mask.shape[1]), scene.mask
        if back_less is not None:
            mask = mask & (back < back_less)
        if ahead_less is not None:
            mask = mask & (-back < ahead_less)
        return mask if ahead is None else mask | ((back < 0) & (-back <= ahead))

    return counts


def at_distance(at: np.ndarray, value: float) -> Counts:
    def counts(scene: Scene) -> np.ndarray:
        back = scene.places[:, None] - np.arange(scene.mask.shape[1])
        return np.where(scene.mask & np.isin(back, at), value, scene.mask)

    return counts
