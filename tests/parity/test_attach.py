"""Attaching to code from outside, and what a probe is told of arrays that lie otherwise than their taps."""

import numpy as np
import pytest

from parity.ports.attach import Attached
from parity.ports.probe import Probe


class Double:
    def __call__(self, x):
        return 2 * x


class Quadruple(Double):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Model:
    def __init__(self):
        self.first, self.second = Double(), Quadruple()

    def __call__(self, x):
        return self.second(self.first(x))


def loop(x):
    for _ in range(2):
        x = x + 1.0
    return x


def test_every_module_is_seen_once_under_its_path():
    model, seen = Model(), []
    with Attached() as code:

        def then(path, output):
            seen.append((path, output, code.path))
            return output + 1

        code.modules([("", model), ("first", model.first), ("second", model.second)], then)
        assert model(1) == 14
        assert Double()(3) == 6
    assert seen == [("first", 2, ""), ("second", 12, ""), ("", 13, "")]
    assert model(1) == 8


def test_the_path_is_that_of_the_module_being_called():
    model, paths = Model(), []
    with Attached() as code:
        code.returned(Double, "__call__", lambda output: paths.append(code.path) or output)
        code.modules([("first", model.first), ("second", model.second)], lambda path, output: output)
        model(1)
    assert paths == ["first", "second"] and code.path == ""


def test_what_a_watcher_returns_is_copied_into_the_variable():
    seen = []

    def bound(value, around):
        seen.append(value.copy())
        return np.full(4, 10.0) if len(seen) == 2 else None

    with Attached() as code:
        code.watch(loop, {"x": bound})
        assert loop(np.zeros((2, 2))).tolist() == [[11, 11], [11, 11]]
    assert [value[0, 0] for value in seen] == [0, 1, 11]
    assert loop(np.zeros(1)) == 2


def test_axes_are_the_taps_both_ways():
    heads = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    forced = np.arange(8, dtype=np.float32).reshape(1, 2, 4) * 100
    probe = Probe({"a/q", "latent"}, {"a/q": (forced, "float32"), "latent": (heads[0].transpose(2, 0, 1), "float32")})
    probe.call({"a": [1]})
    used = probe.rows("q", heads, axes=(2, 1, 3))
    assert np.array_equal(probe.taps["a/q"][0], heads[0].transpose(1, 0, 2)[1:2])
    assert np.array_equal(used[0, :, 1], forced[0]) and np.array_equal(used[:, :, [0, 2]], heads[:, :, [0, 2]])
    assert np.array_equal(probe.value("latent", np.zeros((1, 2, 3, 4), np.float32), axes=(3, 1, 2)), heads)
    for axes in ((0, 0), (1, 2), (4,)):
        with pytest.raises(ValueError, match="are no order of the axes of"):
            probe.value("latent", heads, axes=axes)


def test_a_tap_that_grows_is_gone_on_with_one_by_one():
    probe = Probe({"tokens"}, {"tokens": (np.array([7, 8], np.int32), "int32")})
    assert [probe.next("tokens", number) for number in (1, 2, 3)] == [7, 8, 3]
    assert probe.taps["tokens"][0].tolist() == [1, 2, 3]
