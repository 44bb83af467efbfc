"""Laws of any result: what is done to a part of it, or in which order it is, told with the smallest support."""

import numpy as np
import pytest

from parity.laws import Component, fitted
from parity.laws.numbers import plainest
from parity.laws.rounding import DTYPES
from parity.laws.support import spans

AXES = ("token", "head", "channel")
SHAPE = (24, 4, 16)
FLOOR = 3e-7
bfloat16 = DTYPES["bfloat16"]


def component(seed=0, shape=SHAPE, floor=FLOOR, axes=AXES):
    own = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return Component("any", {}, {}, own, floor * float(np.linalg.norm(own)), axes)


def left(law, given, got):
    values = law.apply(given)
    if values is None or values.shape != got.shape:
        return np.inf
    return float(np.linalg.norm(got.astype(np.float64) - values))


def best(given, got):
    """The smallest of the laws that leave no more than rounding, else the one that leaves least."""
    laws = fitted(given, got)
    assert len({law.sentence for law in laws}) == len(laws)
    order = sorted(laws, key=lambda law: (max(left(law, given, got), 3 * given.rounding), law.size))
    return order[0] if order else None


def put(own, where, values):
    got = own.copy()
    got[where] = values(got[where]) if callable(values) else values
    return got


EVERY = slice(None)
CHANGES = {
    "head 2 alone is 1.01 times as large": lambda x: put(x, np.s_[:, 2], lambda v: v * np.float32(1.01)),
    "channel 7 alone is 0": lambda x: put(x, np.s_[..., 7], 0),
    "from token 12 on it is 1.05 times as large": lambda x: put(x, np.s_[12:], lambda v: v * np.float32(1.05)),
    "up to token 5 it is negated": lambda x: put(x, np.s_[:6], np.negative),
    "in channels 3 to 5 it is 0.25 larger": lambda x: put(x, np.s_[..., 3:6], lambda v: v + np.float32(0.25)),
    "in even tokens it is 2 times as large": lambda x: put(x, np.s_[::2], lambda v: 2 * v),
    "in head 2, from token 12 on, it is 0": lambda x: put(x, np.s_[12:, 2], 0),
    "tokens 3 and 4 are exchanged": lambda x: put(x, np.s_[3:5], lambda v: v[::-1]),
    "tokens are rolled by 1": lambda x: np.roll(x, 1, 0),
    "heads are rolled by -1": lambda x: np.roll(x, -1, 1),
    "channels are reversed": lambda x: x[..., ::-1].copy(),
    "channels are exchanged in pairs": lambda x: x[..., np.arange(16) ^ 1],
    "tokens are 1 too late, the first repeated": lambda x: np.concatenate([x[:1], x[:-1]]),
    "tokens are 1 too early, the last replaced by 0": lambda x: np.concatenate([x[1:], 0 * x[:1]]),
    "token 9 is a copy of the token before it": lambda x: put(x, 9, x[8]),
    "token 9 is a copy of token 2": lambda x: put(x, 9, x[2]),
    "from token 4 on each token is the token before": lambda x: np.concatenate([x[:4], x[3:-1]]),
    "every token is token 0": lambda x: np.repeat(x[:1], len(x), 0),
    "in head 1 tokens are reversed": lambda x: put(x, np.s_[:, 1], lambda v: v[::-1]),
    "tokens and heads in memory are exchanged before they are laid out": lambda x: x.swapaxes(0, 1).reshape(x.shape),
    "channels are read as 8 x 2 transposed": lambda x: x.reshape(24, 4, 8, 2).swapaxes(2, 3).reshape(x.shape),
    "the result is negated": np.negative,
    "the result is 2 times as large": lambda x: 2 * x,
    "the result is 1/sqrt(2) times as large": lambda x: x * np.float32(2**-0.5),
    "the result is 0.5 times as large plus 0.5": lambda x: x / 2 + np.float32(0.5),
    "the result is clamped to [-1.5, 1.5]": lambda x: x.clip(-1.5, 1.5),
    "the result is at most 1.25": lambda x: x.clip(None, 1.25),
    "the result has no sign": np.abs,
    "the result is rounded to bfloat16": lambda x: bfloat16(x).astype(np.float32),
    "head 1 alone is rounded to bfloat16": lambda x: put(x, np.s_[:, 1], bfloat16),
    "the last token is missing": lambda x: x[:-1],
    "token 5 is missing": lambda x: np.delete(x, 5, 0),
    "the last token is repeated": lambda x: np.concatenate([x, x[-1:]]),
    "each channel has a factor of its own, 0.9 to 1.1": lambda x: x * np.linspace(0.9, 1.1, 16, dtype=np.float32),
    "heads are in another order: 0 holds 2, 1 holds 0, 2 holds 3, 3 holds 1": lambda x: x[:, [2, 0, 3, 1]],
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sentence", CHANGES)
def test_what_is_done_is_told_with_its_numbers_and_its_support(sentence, seed):
    given = component(seed)
    got = CHANGES[sentence](given.own)
    law = best(given, got)
    assert law is not None and law.sentence == sentence
    assert left(law, given, got) <= max(given.rounding, 1e-5 * np.linalg.norm(got))
    # A number for each says what, and not why.
    assert law.describes == ("of its own" in sentence)
    # It holds of other values too.
    other = component(seed + 100)
    expected = CHANGES[sentence](other.own)
    assert left(law, other, expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("seed", range(3))
def test_clean_data_and_noise_have_no_law(seed):
    given, rng = component(seed), np.random.default_rng(seed + 50)
    noise = rng.standard_normal(SHAPE).astype(np.float32)
    assert fitted(given, given.own.copy()) == []
    assert fitted(given, given.own * np.float32(1 + 1e-7)) == []
    for size in (1e-3, 0.1, 1.0):
        assert fitted(given, given.own + size * noise) == []
        assert fitted(given, put(given.own, 5, lambda v, size=size: v + size * noise[5])) == []
    # One value says nothing of a factor.
    assert fitted(given, put(given.own, (3, 1, 7), lambda v: v * np.float32(1.01))) == []


@pytest.mark.parametrize("change", ["head 2", "tokens from 12", "all", "rolled"])
@pytest.mark.parametrize("seed", range(2))
def test_bfloat16_hides_no_law(change, seed):
    rng = np.random.default_rng(seed)
    exact = rng.standard_normal(SHAPE)
    own = bfloat16(exact).astype(np.float32)
    given = Component("any", {}, {}, own, 2e-3 * float(np.linalg.norm(own)), AXES)
    changes = {
        "head 2": (np.s_[:, 2], 1.02, "head 2 alone is 1.02 times as large"),
        "tokens from 12": (np.s_[12:], 1.05, "from token 12 on it is 1.05 times as large"),
        "all": (np.s_[:], 0.9, "the result is 0.9 times as large"),
    }
    exact = exact * (1 + 1e-3 * rng.standard_normal(SHAPE))
    if change == "rolled":
        exact, sentence = np.roll(exact, 1, 0), "tokens are rolled by 1"
    else:
        where, factor, sentence = changes[change]
        exact[where] *= factor
    assert best(given, bfloat16(exact).astype(np.float32)).sentence == sentence


def test_two_changes_are_read_one_after_the_other():
    given = component()
    got = put(put(given.own, np.s_[12:], lambda v: v * np.float32(1.05)), np.s_[..., 7], 0)
    first = best(given, got)
    assert first.sentence == "channel 7 alone is 0"
    beside = Component("any", {}, {}, first.apply(given), given.rounding, AXES)
    assert best(beside, got).sentence == "from token 12 on it is 1.05 times as large"


def test_the_last_index_is_told_from_the_start_and_from_the_end():
    given = component()
    got = put(given.own, -1, 0)
    assert {law.sentence for law in fitted(given, got)} == {"token 23 alone is 0", "the last token alone is 0"}
    shorter = component(7, (9, 4, 16))
    law = next(law for law in fitted(given, got) if "last" in law.sentence)
    assert not law.apply(shorter)[-1].any() and np.array_equal(law.apply(shorter)[:-1], shorter.own[:-1])


def test_where_alone_it_is_nan():
    given = component()
    law = best(given, put(given.own, np.s_[..., 7], np.nan))
    assert law.sentence == "channel 7 alone is NaN"
    assert np.isnan(law.apply(given)[..., 7]).all() and np.isfinite(law.apply(given)[..., :7]).all()


@pytest.mark.parametrize(
    ("own", "got", "axes"),
    [
        (np.zeros((3, 4), np.float32), np.ones((3, 4), np.float32), ("token", "channel")),
        (np.ones((3, 4), np.float32), np.zeros((3, 4), np.float32), ("token", "channel")),
        (np.ones((1, 1), np.float32), np.full((1, 1), 2, np.float32), ("token", "channel")),
        (np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32), ("token", "channel")),
        (np.full((3, 4), np.nan, np.float32), np.ones((3, 4), np.float32), ("token", "channel")),
        (np.ones((3, 4), np.float32), np.full((3, 4), np.inf, np.float32), ("token", "channel")),
        (np.ones((3, 4), np.float32), np.ones((4, 3, 2), np.float32), ("token", "channel")),
        (np.ones((3, 4), np.float32), np.zeros((3, 4), np.float32), ()),
        (np.arange(6, dtype=np.int32), np.arange(6, dtype=np.int32)[::-1].copy(), ("token",)),
        (np.float32(3.0), np.float32(4.0), ()),
    ],
)
def test_data_that_say_little_do_not_raise(own, got, axes):
    given = Component("any", {}, {}, np.asarray(own), 0.0, axes)
    for law in fitted(given, np.asarray(got)):
        law.apply(given)


def test_a_law_says_nothing_of_what_lacks_its_axis():
    given = component()
    law = best(given, CHANGES["head 2 alone is 1.01 times as large"](given.own))
    assert law.apply(component(1, (24, 16), axes=("token", "channel"))) is None


@pytest.mark.parametrize(
    ("value", "within", "number", "said"),
    [
        (1.0099998, 1e-6, 1.01, "1.01"),
        (0.70711, 1e-4, 2**-0.5, "1/sqrt(2)"),
        (9999.7, 1.0, 10000.0, "10000"),
        (1.0000002e-5, 1e-10, 1e-5, "1e-5"),
        (0.0312501, 1e-6, 1 / 32, "0.03125"),
        (3e-10, 1e-9, 0.0, "0"),
        (1.23456789, 1e-9, 1.23456789, "1.235"),
    ],
)
def test_numbers_are_told_as_people_write_them(value, within, number, said):
    assert plainest(value, within) == (pytest.approx(number), said)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ([3], "token 3"),
        ([0], "token 0"),
        ([0, 1, 2], "up to token 2"),
        ([7, 8, 9], "from token 7 on"),
        ([2, 3], "tokens 2 and 3"),
        ([2, 3, 4], "tokens 2 to 4"),
        ([0, 2, 4, 6, 8], "even tokens"),
        ([1, 4, 7], "every 3rd token from 1 on"),
        ([0, 1, 2, 4, 5, 6, 7, 8, 9], "all tokens but 3"),
        ([1, 2, 7], "tokens 1, 2 and 7"),
    ],
)
def test_indices_are_told_plainly_and_hold_for_other_lengths(chosen, words):
    mask = np.isin(np.arange(10), chosen)
    found = spans("token", mask)
    assert found[0].words == words
    assert all(np.array_equal(span.of(10), mask) for span in found)
    assert spans("token", np.ones(10, bool)) == spans("token", np.zeros(10, bool)) == []
