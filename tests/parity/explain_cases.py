"""Places that are wrong by what is known, and hypotheses about them."""

import numpy as np

from parity.hypotheses import Hypothesis

SIZE = 64


class Place:
    """A site of made-up arrays."""

    def __init__(self, got, expected=None, exact=False, component="norm", floor=0.0, own=None, **known):
        self.expected = base() if expected is None else expected
        self.own = self.expected if own is None else own
        self.shared, self.allowed, self.dtype = None, known.get("allowed"), known.get("dtype", "float32")
        self.right = ()
        self.got, self.exact, self.component, self.floor = got, exact, component, floor
        self.computed = 0

    def recompute(self):
        self.computed += 1
        return self.own.copy()

    def known(self, own):
        """Nothing is known of it: no laws are read."""
        return None

    def judged(self, array):
        return array


def base(seed=0):
    return np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32) + 2


def at(index, name=None, amount=1.0, components=("*",)):
    """A hypothesis that adds to some elements; those of others are left alone."""
    hit = np.arange(SIZE) % 8 == index

    def transform(site, array):
        return (array + amount * hit).astype(np.float32)

    return Hypothesis(name or f"h{index}", components, transform=transform)


def caused_by(*hypotheses, **values):
    array = base()
    for hypothesis in hypotheses:
        array = hypothesis.transform(None, array)
    return Place(array, **values)


def names(causes):
    return [hypothesis.name for hypothesis in causes.together]


ALL = [at(index) for index in range(8)]
