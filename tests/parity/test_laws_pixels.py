"""Laws of pixels: another function of each value, or values in another order."""

import numpy as np
import pytest

from parity.laws import Component, fitted
from parity.laws.pixel_curve import FITTERS
from parity.laws.rounding import bfloat16

AXES = ("colour", "frame", "row", "column")
SHAPE = (3, 5, 32, 48)
FACTS = {"packed": ("colour", "column", "row"), "side": 2}


def smooth(seed):
    raw = np.random.default_rng(seed).standard_normal(SHAPE)
    for axis in (2, 3, 2, 3):
        raw = raw + np.roll(raw, 1, axis)
    return (0.6 * raw / raw.std()).astype(np.float32)


def pixels(seed=0):
    raw = smooth(seed)
    own = raw.clip(-1, 1)
    return Component("pixel_curve", {"x": raw}, FACTS, own, 3e-7 * float(np.linalg.norm(own)), AXES)


def frames(seed=0):
    decoded = smooth(seed).clip(-1, 1)
    own = np.rint(decoded * 127.5 + 127.5).astype(np.int32)
    return Component("pixel_curve", {"x": decoded}, FACTS, own, 0.0, AXES)


def best(given, got):
    def left(law):
        values = law.apply(given)
        return np.inf if values is None else float(np.linalg.norm(got - values.astype(np.float64)))

    apart = float(np.linalg.norm(got - given.own.astype(np.float64)))
    laws = sorted(fitted(given, got), key=lambda law: (max(left(law), 1e-3 * apart), law.size))
    return (laws[0], left(laws[0]) / apart) if laws else (None, np.inf)


def unpacked(own, order):
    """What packed channels (colour, column, row) are where they are read in another order."""
    sizes = {"colour": 3, "column": 2, "row": 2}
    packed = own.reshape(3, 5, 16, 2, 24, 2).transpose(0, 5, 3, 1, 2, 4).reshape(12, 5, 16, 24)
    read = packed.reshape(*(sizes[name] for name in order), 5, 16, 24)
    at = [order.index(name) for name in ("colour", "row", "column")]
    return read.transpose(at[0], 3, 4, at[1], 5, at[2]).reshape(own.shape)


CHANGES = {
    "the result is 0.5 times as large plus 0.5": lambda x, raw: x / 2 + np.float32(0.5),
    "each value is x of what it is made of": lambda x, raw: raw,
    "each value is tanh(x) of what it is made of": lambda x, raw: np.tanh(raw),
    "each value is the power 0.45 of [-1, 1]": lambda x, raw: (2 * ((x + 1) / 2) ** 0.45 - 1).astype(np.float32),
    "each value is (1.1 x) within [-1, 1]": lambda x, raw: (x * np.float32(1.1)).clip(-1, 1),
    "each value is rounded to a multiple of 1/127.5": lambda x, raw: (np.rint(x * 127.5) / 127.5).astype(np.float32),
    "colours are reversed": lambda x, raw: x[::-1],
    "columns are reversed": lambda x, raw: x[..., ::-1],
    "frames are reversed": lambda x, raw: x[:, ::-1],
    "columns are rolled by 1": lambda x, raw: np.roll(x, 1, 3),
    "rows and columns in memory are exchanged before they are laid out": lambda x, raw: x.swapaxes(2, 3).reshape(
        x.shape
    ),
    "packed channels (of each 2x2 square) laid out as (colour, column, row) are read as (row, column, colour)": (
        lambda x, raw: unpacked(x, ("row", "column", "colour"))
    ),
    "colour 0 alone is 0.9 times as large": lambda x, raw: np.concatenate([x[:1] * np.float32(0.9), x[1:]]),
    "frame 2 is a copy of the frame before it": lambda x, raw: x[:, [0, 1, 1, 3, 4]],
}


@pytest.mark.parametrize("sentence", CHANGES)
def test_what_is_done_to_pixels_is_told(sentence):
    given = pixels()
    law, left = best(given, np.ascontiguousarray(CHANGES[sentence](given.own, given.inputs["x"])))
    assert law is not None and law.sentence == sentence and left < 1e-3
    other = pixels(4)
    expected = CHANGES[sentence](other.own, other.inputs["x"])
    assert np.linalg.norm(law.apply(other) - expected) <= 1e-3 * np.linalg.norm(expected - other.own)


@pytest.mark.parametrize(
    ("sentence", "change"),
    [
        ("(127.5 x + 127.5) rounded down within [0, 255]", lambda x: np.floor(127.5 * x + 127.5)),
        ("(128 x + 128) rounded within [0, 255]", lambda x: np.rint(128 * x + 128).clip(0, 255)),
        ("(128 x + 128) rounded modulo 256", lambda x: np.rint(128 * x + 128) % 256),
        ("(255 x) rounded within [0, 255]", lambda x: np.rint(255 * x).clip(0, 255)),
    ],
)
def test_what_8_bits_are_made_of_is_told(sentence, change):
    given = frames()
    law, left = best(given, change(given.inputs["x"].astype(np.float64)).astype(np.int32))
    assert law is not None and sentence in law.sentence and left < 1e-2
    assert law.apply(given).dtype == np.int32


def test_the_numbers_of_8_bits_are_told_of_what_bfloat16_holds():
    narrow = bfloat16(frames().inputs["x"])
    own = np.rint(narrow * 127.5 + 127.5).astype(np.int32)
    given = Component("pixel_curve", {"x": narrow}, FACTS, own, 0.0, AXES)
    law, left = best(given, np.rint((narrow + 1.0) * 127).astype(np.int32))
    words = "each value is (127 x + 127) rounded within [0, 254] of what it is made of"
    assert law is not None and law.sentence == words and not left


def test_a_curve_without_a_name_is_drawn():
    given = pixels()
    law, left = best(given, (0.5 * given.own**3 + 0.5 * given.own).astype(np.float32))
    assert law.sentence.startswith("each value is another function: ") and left < 0.05
    assert set(law.figure.lines) == {"expected", "found"}


def test_a_curve_of_one_frame_is_told_so():
    given = frames()
    got = given.own.copy()
    got[:, 4] = np.floor(127.5 * given.inputs["x"][:, 4] + 127.5)
    assert best(given, got)[0].sentence.startswith("in frame 4 each value is (127.5 x + 127.5) rounded down")


@pytest.mark.parametrize("size", [1e-3, 0.05])
def test_clean_data_and_noise_have_no_law(size):
    given = pixels()
    assert fitted(given, given.own.copy()) == []
    noise = np.random.default_rng(3).standard_normal(SHAPE).astype(np.float32)
    assert fitted(given, given.own + np.float32(size) * noise) == []
    for fitter in FITTERS:
        for got in (given.own[:1], 0 * given.own, given.own * np.nan):
            assert all(law.apply(given) is not None for law in fitter(given, got))


def test_values_mixed_with_those_beside_them_are_told():
    given = pixels()
    got = given.own.copy()
    got[..., 23:25] = got[..., 23:25].mean(-1, keepdims=True)
    law, left = best(given, got)
    assert law.sentence == "the columns 23 and 24 in the middle are both their mean" and left < 1e-3
    assert law.apply(Component(given.kind, {}, FACTS, given.own[..., :40], 0.0, AXES)) is None
    blurred = 0.5 * given.own + 0.25 * (np.roll(given.own, 1, 2) + np.roll(given.own, -1, 2))
    blurred[:, :, [0, -1]] = given.own[:, :, [0, -1]]
    law, left = best(given, blurred)
    words = "each row is 0.25 times the one 1 before + 0.5 times itself + 0.25 times the one 1 behind"
    assert law.sentence.endswith(words) and left < 1e-3


@pytest.mark.parametrize("given", [pixels(), frames()])
def test_a_row_of_nothing_is_told_so(given):
    got = given.own.copy()
    got[:, :, -1] = 0
    assert "each row is " not in {law.sentence for law in fitted(given, got)}
    law, left = best(given, got)
    assert "row 31" in law.sentence and law.sentence.endswith("is 0") and not left


def test_chroma_that_squares_share_is_told_of_8_bits():
    given = frames()
    values = (given.inputs["x"].astype(np.float64) + 1) * 127.5
    luma = np.tensordot([0.299, 0.587, 0.114], values, 1)
    parts = (values - luma).reshape(3, 5, 16, 2, 24, 2)
    shared = luma + np.broadcast_to(parts.mean((3, 5), keepdims=True), parts.shape).reshape(SHAPE)
    law, left = best(given, np.rint(shared.clip(0, 255)).astype(np.int32))
    assert law.sentence == "each 2 by 2 pixels share the mean of their chroma (BT.601)" and left < 1e-6
