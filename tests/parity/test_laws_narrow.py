"""Where something is rounded to bfloat16 is read from results alone, and nothing is read where nothing is wrong."""

import numpy as np
import pytest

from parity.laws import Component, fitted, turning
from parity.laws import rotary as turns
from parity.laws.patches import all_places, convolved, laid_out
from parity.laws.rounding import bfloat16

CHANNELS = 32


def norm(seed=0, rows=60, by_length=True):
    r = np.random.default_rng(seed)
    x = bfloat16(r.standard_normal((rows, CHANNELS)))
    facts = {"weight": bfloat16(1 + 0.3 * r.standard_normal(CHANNELS)), "eps": 0.0, "by_length": by_length}
    return Component("norm", {"x": x}, facts, np.zeros(1))


def normed(component, sums=False, root=True, before=True, result=True):
    x, weight = component.inputs["x"], component.facts["weight"]
    of = lambda on, value: bfloat16(value) if on else value.astype(np.float32)  # noqa: E731
    total = of(sums, np.square(x.astype(np.float64)).sum(1, keepdims=True))
    y = of(before, x / of(root, np.sqrt(total)))
    return of(result, of(before, y * np.float32(CHANNELS**0.5)) * weight)


def held(component, own, noise=1e-3):
    size = noise * float(np.linalg.norm(own))
    return Component(component.kind, component.inputs, component.facts, own, size, component.axes)


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ({"root": False}, "the root is not rounded"),
        ({"sums": True}, "the sum of squares is rounded"),
        ({"root": False, "before": False, "sums": True}, "the root, the normed x and the normed x times the root of "
         "the channels are not rounded and the sum of squares is rounded"),
        ({"result": False}, "the result is not rounded"),
    ],
)  # fmt: skip
def test_the_steps_of_a_norm_that_are_rounded_are_told(steps, sentence):
    component = held(norm(), normed(norm()))
    law = fitted(component, normed(norm(), **steps))[0]
    assert law.sentence == sentence
    other = held(norm(3, 80), normed(norm(3, 80)))
    assert np.array_equal(law.apply(other), normed(norm(3, 80), **steps))


def convolution(seed=0):
    r = np.random.default_rng(seed)
    facts = {"weight": bfloat16(r.standard_normal((8, 6, 3, 3, 3)) * 0.1), "bias": bfloat16(r.standard_normal(8)),
             "stride": (1, 1, 1), "pads": ((1, 1), (1, 1)), "history": 2}  # fmt: skip
    wide = r.standard_normal((1, 6, 4, 5, 7)).astype(np.float32)
    facts["read_once"] = lambda: bfloat16(wide)
    x = bfloat16(bfloat16(wide * 1.5) / 1.5)
    return Component("convolution", {"x": x}, facts, np.zeros((1, 8, 2, 5, 7), np.float32))


def convolve(component, frames=False, product=False, once=False):
    from parity.laws.convolution import reading_of

    reading, shape = reading_of(component), component.own.shape
    x = component.facts["read_once"]()[0] if once else reading.x
    total = 0.0
    for frame in range(3):
        weight = np.zeros_like(reading.weight)
        weight[:, :, frame] = reading.weight[:, :, frame]
        part = convolved(x, weight, reading.geometry, all_places(shape))
        total = bfloat16(total + bfloat16(part)) if frames else total + part
    total = bfloat16(total) if product else np.asarray(total, np.float32)
    return laid_out(bfloat16(total + component.facts["bias"]), shape).astype(np.float32)


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ({"product": True}, "the product without the bias is rounded"),
        ({"frames": True}, "the product of each of the kernel's frames is rounded"),
        ({"once": True, "product": True},
         "what it reads is rounded once and the product without the bias is rounded"),
    ],
)  # fmt: skip
def test_the_steps_of_a_convolution_that_are_rounded_are_told(steps, sentence):
    component = convolution()
    component = held(component, convolve(component))
    law = fitted(component, convolve(component, **steps))[0]
    assert law.sentence == sentence
    other = convolution(5)
    other = held(other, convolve(other))
    assert np.array_equal(law.apply(other), convolve(other, **steps))


def added(seed=0):
    r = np.random.default_rng(seed)
    gen = np.arange(30) > 9
    inputs = {name: bfloat16(r.standard_normal((30, 16))) for name in ("the words", "the times", "the places", "x")}
    rows = {name: ~gen if name == "the words" else gen for name in inputs}
    parts = {name: np.where(rows[name][:, None], array, 0) for name, array in inputs.items()}
    component = Component("array", inputs, {"added": rows}, np.zeros((30, 16)))
    in_order = lambda *names: bfloat16(bfloat16(parts[names[0]] + parts[names[1]]) + parts[names[2]])  # noqa: E731
    words = parts["the words"]
    own = words + in_order("x", "the times", "the places")
    last = words + in_order("x", "the places", "the times")
    return held(component, own), last, words + bfloat16(parts["x"] + parts["the times"] + parts["the places"])


def test_the_order_of_a_sum_and_where_it_is_rounded_are_told():
    (component, last, once), (other, other_last, other_once) = added(), added(4)
    laws = [fitted(component, got)[0] for got in (last, once)]
    assert [law.sentence for law in laws] == ["the times are added last", "the sum is rounded once"]
    assert np.array_equal(laws[0].apply(other), other_last)
    assert np.array_equal(laws[1].apply(other), other_once)


def test_what_is_right_or_noise_tells_no_step():
    r = np.random.default_rng(2)
    one, two, (three, *_) = norm(), convolution(), added()
    for component in (held(one, normed(one)), held(two, convolve(two)), three):
        scale = float(np.std(component.own))
        for got in (component.own, bfloat16(component.own + 0.01 * scale * r.standard_normal(component.own.shape))):
            assert not [law for law in fitted(component, got) if "rounded" in law.sentence]


def test_a_rotation_by_a_table_in_float32_is_told():
    r = np.random.default_rng(1)
    ids = np.tile(np.arange(60, 140), (3, 1)).astype(np.int32)
    axes, speeds = np.repeat(np.arange(3), [2, 3, 3]), 1e6 ** -turning.even_exponents(8)
    x = bfloat16(r.standard_normal((80, 2, 16)))
    angles = ids[axes].T * bfloat16(speeds)
    inputs = {"x": x, "cos": bfloat16(np.cos(angles)), "sin": bfloat16(np.sin(angles)), "position_ids": ids}
    component = Component("rotary", inputs, {"theta": 1e6, "axes": axes, "axis_names": "thw"}, x)

    def turned(table):
        z = turning.as_pairs(x) * table[:, None]
        return np.concatenate([z.real, z.imag], -1).astype(np.float32)

    component = held(component, turned(inputs["cos"] + 1j * inputs["sin"]), 1e-7)
    exact = np.exp(1j * ids[axes].T * speeds)
    laws = [next(turns.rotary(component, turned(table))).sentence for table in (exact, np.exp(1j * angles))]
    assert laws == ["frequencies, cosines and sines are float32", "cosines and sines are float32"]
