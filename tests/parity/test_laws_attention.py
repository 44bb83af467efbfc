"""Laws of rotations and of attention are read from made-up inputs, and nothing is read where nothing is wrong."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from lance_mlx.model.mot import ScaledDotProductAttention
from parity.lance.faults.base import Fault, calls
from parity.laws import attention as laws
from parity.laws import rotary as turns
from parity.laws import scoring, turning
from parity.laws.attending import made, one_after_another, result_of, scene_of
from parity.laws.base import Component
from parity.laws.rounding import grids, rounded_to
from parity.laws.seen import counted

HALF, THETA = 8, 1e6


def rotary(seed=0, rows=48, heads=4, dtype="float32"):
    rng = np.random.default_rng(seed)
    ids = np.stack([np.full(rows, 80), 80 + np.arange(rows) // 8, 80 + np.arange(rows) % 8])
    axes = np.array([0, 0, 1, 1, 1, 2, 2, 2])
    if seed % 2:
        ids = np.tile(np.arange(rows), (3, 1))
    angles = ids[axes].T * THETA ** -turning.even_exponents(HALF)
    x = rounded_to(dtype, rng.standard_normal((rows, heads, 2 * HALF))).astype(np.float32)
    cos, sin = (rounded_to(dtype, f(angles)).astype(np.float32) for f in (np.cos, np.sin))
    facts = {"theta": THETA, "axes": axes, "axis_names": "thw"}
    inputs = {"x": x, "cos": cos, "sin": sin, "position_ids": ids.astype(np.int32)}
    turn = turning.turn_of(Component("rotary", inputs, facts, x))
    own = rounded_to(dtype, joined(turn.turned)).astype(np.float32)
    noise = {"float32": 1e-7, "bfloat16": 4e-3}[dtype]
    return Component("rotary", inputs, facts, own, noise * float(np.linalg.norm(own)))


def joined(z):
    return np.concatenate([z.real, z.imag], -1)


def turned(component, change, dtype="float32"):
    return rounded_to(dtype, joined(change(turning.turn_of(component)))).astype(np.float32)


def best(fitter, component, got):
    found = list(fitter(component, got))
    assert found, "no law"
    left = np.linalg.norm(found[0].apply(component) - got.astype(np.float64))
    assert left <= max(0.02 * np.linalg.norm(got - component.own), 3 * component.rounding)
    return found[0]


def rounded_products(x, ids, axes, dtype="bfloat16"):
    """What halves [n, heads, d / 2] become that are turned in bfloat16, every product and sum rounded."""
    angles = ids[axes].T * rounded_to(dtype, THETA ** -turning.even_exponents(HALF))
    cos, sin = (rounded_to(dtype, f(angles))[:, None] for f in (np.cos, np.sin))
    (a, b), r = (x[..., :HALF], x[..., HALF:]), lambda v: rounded_to(dtype, v)
    both = r(r(a * cos) - r(b * sin)), r(r(b * cos) + r(a * sin))
    inputs = {"x": x, "cos": cos[:, 0].astype(np.float32), "sin": sin[:, 0].astype(np.float32)}
    return np.concatenate(both, -1).astype(np.float32), inputs | {"position_ids": ids.astype(np.int32)}


@pytest.mark.parametrize("order", [(0, 2, 1), (2, 1, 0)])
def test_axes_in_another_order_are_told_of_few_tokens_to_the_last_bit(order):
    ids = np.array([[27, 28, 28, 28, 28, 30], [27, 28, 28, 29, 29, 30], [27, 28, 29, 28, 29, 30]])
    axes = np.array([0, 0, 1, 1, 1, 2, 2, 2])
    x = rounded_to("bfloat16", np.random.default_rng(3).standard_normal((6, 4, 2 * HALF))).astype(np.float32)
    own, inputs = rounded_products(x, ids, axes)
    got, _ = rounded_products(x, ids, np.array(order)[axes])
    facts = {"theta": THETA, "axes": axes, "axis_names": "thw"}
    law = next(iter(turns.rotary(Component("rotary", inputs, facts, own, 0.03), got)))
    a, b = ("thw"[axis] for axis in range(3) if order[axis] != axis)
    assert law.sentence == f"the frequencies of {a} follow {b} and those of {b} follow {a}"
    np.testing.assert_array_equal(law.apply(Component("rotary", inputs, facts, own)), got)


def test_theta_is_read_of_a_single_token():
    component = rotary(seed=1, rows=58)
    one = {name: array[57:] for name, array in component.inputs.items()}
    one["position_ids"] = component.inputs["position_ids"][:, 57:]
    alone = replace(component, inputs=one, own=component.own[57:])
    got = turned(alone, lambda t: t.by(t.positions * 1e4 ** -turning.even_exponents(HALF)))
    assert next(iter(turns.rotary(alone, got))).sentence == "theta is 10000"


ROTATIONS = {
    "the sine of the second half has the wrong sign": lambda t: (
        t.turned.real + 1j * (t.table.real[:, None] * t.z.imag - t.table.imag[:, None] * t.z.real)
    ),
    "the rotation goes the other way": lambda t: t.z * t.table.conj()[:, None],
    "the rotation goes the other way, head 1 alone": lambda t: np.where(
        (np.arange(4) == 1)[:, None], t.z * t.table.conj()[:, None], t.turned
    ),
    "theta is 500000": lambda t: t.by(t.positions * 5e5 ** -turning.even_exponents(HALF)),
    "theta is 1234567": lambda t: t.by(t.positions * 1234567 ** -turning.even_exponents(HALF)),
    "angles are 0.25 times as large": lambda t: t.by(t.positions * t.frequencies / 4),
    "frequency 7 does not turn": lambda t: np.where(np.arange(HALF) == 7, t.z, t.turned),
    "frequency 2 does not turn": lambda t: np.where(np.arange(HALF) == 2, t.z, t.turned),
    "positions are shifted by 3": lambda t: t.by((t.positions + 3) * t.frequencies),
    "positions are multiplied by 0.5 and rounded down": lambda t: t.by(np.floor(t.positions / 2) * t.frequencies),
    "nothing is turned": lambda t: t.z,
}


@pytest.mark.parametrize("sentence", ROTATIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_what_turns_otherwise_is_read_from_the_angles(sentence, seed):
    component = rotary(seed)
    assert best(turns.rotary, component, turned(component, ROTATIONS[sentence])).sentence == sentence


def test_axes_that_have_the_same_frequencies_each_are_read_with_theirs():
    ids = np.indices((6, 8)).reshape(2, -1).astype(np.int32)
    exponents, axes = np.tile(turning.even_exponents(HALF // 2), 2), np.repeat([0, 1], HALF // 2)
    x = np.random.default_rng(0).standard_normal((48, 4, 2 * HALF)).astype(np.float32)
    table = np.exp(1j * ids[axes].T * THETA**-exponents)
    facts = {"theta": THETA, "exponents": exponents, "axes": axes, "axis_names": "hw"}
    inputs = {"x": x, "cos": np.float32(table.real), "sin": np.float32(table.imag), "position_ids": ids}
    own = joined(turning.turn_of(Component("rotary", inputs, facts, x)).turned).astype(np.float32)
    component = Component("rotary", inputs, facts, own, 1e-7 * float(np.linalg.norm(own)))
    assert best(turns.rotary, component, turned(component, lambda t: t.with_theta(5e5))).sentence == "theta is 500000"


@pytest.mark.parametrize("limit", [20, 37])
def test_positions_that_are_clipped_or_wrapped_are_told_and_hold_on_other_rows(limit):
    component, other = rotary(1), rotary(3, rows=80)
    for words, change in (
        (f"positions above {limit} read {limit}", lambda p: np.minimum(p, limit)),
        (f"positions are taken modulo {limit}", lambda p: p % limit),
    ):
        make = lambda t, change=change: t.by(change(t.positions) * t.frequencies)  # noqa: E731
        law = best(turns.rotary, component, turned(component, make))
        assert law.sentence == words
        np.testing.assert_allclose(law.apply(other), turned(other, make), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_positions_that_are_clipped_and_angles_that_are_slowed_are_told_together(dtype):
    component, other = rotary(seed=1, dtype=dtype), rotary(seed=3, rows=60, dtype=dtype)
    change = lambda t: t.by(0.5 * np.minimum(t.positions, 30) * t.frequencies)  # noqa: E731
    law = best(turns.rotary, component, turned(component, change, dtype))
    assert law.sentence == "positions above 30 read 30, and angles are 0.5 times as large"
    left = np.linalg.norm(law.apply(other) - turned(other, change, dtype))
    assert left <= 3 * other.rounding
    # Where none is within the limit, what it is of is not known.
    above = rotary(seed=0, dtype=dtype)
    one = lambda t: t.by(np.full_like(t.positions, 31.5) * t.frequencies)  # noqa: E731
    sentences = [law.sentence for law in turns.rotary(above, turned(above, one, dtype))]
    assert "every position reads 31.5" in sentences and not any("above" in sentence for sentence in sentences)


def test_sections_that_follow_other_axes_are_named():
    component = rotary(0)
    order = np.array([0, 0, 2, 2, 2, 1, 1, 1])
    law = best(turns.rotary, component, turned(component, lambda t: t.by(t.ids[order].T * t.frequencies)))
    assert law.sentence == "the frequencies of h follow w and those of w follow h"


def test_rotations_are_read_in_bfloat16():
    component = rotary(1, dtype="bfloat16")
    for words, change in (
        ("positions above 20 read 20", lambda t: t.by(np.minimum(t.positions, 20) * t.frequencies)),
        ("angles are 0.5 times as large", lambda t: t.by(t.positions * t.frequencies / 2)),
        ("the rotation goes the other way", lambda t: t.z * t.table.conj()[:, None]),
    ):
        assert best(turns.rotary, component, turned(component, change, "bfloat16")).sentence == words


def attention(seed=0, past=40, rows=24, heads=4, kv=2, d=16, dtype="float32", causal=False, weight=False):
    rng = np.random.default_rng(seed)
    m = past + rows
    q, k, v = (rounded_to(dtype, rng.standard_normal((n, h, d))).astype(np.float32) for n, h in
               ((rows, heads), (m, kv), (m, kv)))  # fmt: skip
    mask = np.tri(rows, m, past, dtype=bool) if causal else np.ones((rows, m), bool)
    places = np.arange(past, m)
    frame = np.where(np.arange(m) < past, -1, np.maximum(np.arange(m) - past, 0) // 8)
    facts = {"places": places, "labels": {"frame": frame}, "others": {}}
    width = heads * d
    if weight:
        facts |= {"weight": rng.standard_normal((width, width)).astype(np.float32) / width**0.5}
    component = Component("attention", {"q": 2 * q, "k": k, "v": v, "mask": mask}, facts, np.zeros((rows, heads, d)))
    own = result_of(replace(component, own=np.zeros((rows, width) if weight else (rows, heads, d))), plain(component))
    own = rounded_to(dtype, own).astype(np.float32)
    noise = {"float32": 2e-7, "bfloat16": 3e-3}[dtype]
    return replace(component, own=own, rounding=noise * float(np.linalg.norm(own)))


def plain(component):
    return scene_of(component).attended()


def attended(component, change, dtype="float32"):
    scene = scene_of(component)
    got = component.own + result_of(component, made(change, scene) - scene.attended())
    return rounded_to(dtype, got).astype(np.float32)


def masked(rule):
    return counted(lambda s: rule(s.mask, s.places[:, None], np.arange(s.mask.shape[1])[None]))


def in_head(change, head):
    return lambda s: np.where((np.arange(len(s.q)) == head)[:, None, None], change(s), s.attended())


EIGHT_BITS = {words: how for words, _, how in grids(16)}["is quantized to 8 bits row by row, symmetric"]


def before_this_pass(change, x):
    return np.where(np.arange(x.shape[1])[:, None] < 40, change(x), x)


CHANGES = {
    "keys more than 15 tokens back are not seen": masked(lambda seen, q, k: seen & (q - k < 16)),
    "the first key is not seen": masked(lambda seen, q, k: seen & (k > 0)),
    "the last key before this pass is not seen": masked(lambda seen, q, k: seen & (k != 39)),
    "key 7 counts twice": masked(lambda seen, q, k: seen * np.where(k == 7, 2.0, 1.0)),
    "keys 10 to 14 are not seen": masked(lambda seen, q, k: seen & ((k < 10) | (k > 14))),
    "no key before this pass is seen": masked(lambda seen, q, k: seen & (k >= 40)),
    "queries see the keys of their own frame alone": masked(
        lambda seen, q, k: seen & (k >= 40) & ((q - 40) // 8 == (k - 40) // 8)
    ),
    "scores are capped at 2 by tanh": scoring.capped(np.float64(2)),
    "scores are 0.9 times as large": scoring.scaled(np.float64(0.9)),
    "scores are 1/sqrt(2) times as large, head 2 alone": in_head(scoring.scaled(np.float64(0.5**0.5)), 2),
    "what is attended is 1.01 times as large, head 2 alone": in_head(scoring.larger(np.float64(1.01)), 2),
    "the softmax has one more score of 1": scoring.sink(1.0),
    "4 more keys and values of 0 are seen": scoring.sink(np.log(4.0)),
    "scores fall by 0.05 for every token between query and key": scoring.biased(np.float64(0.05)),
    "only the 8 highest scores of a query count": scoring.highest(np.float64(8)),
    "the value of key 5 is 0": lambda s: replace(s, v=s.v * (np.arange(s.v.shape[1]) != 5)[:, None]).attended(),
    "head 0 reads keys and values of key head 1": scoring.of_key_heads(np.array([1, 0, 1, 1]), 1, 1),
    "head 0 reads keys and values of key head 1, and scores are capped at 10 by tanh": one_after_another(
        scoring.of_key_heads(np.array([1, 0, 1, 1]), 1, 1), scoring.capped(np.float64(10))
    ),
    "scores and weights are bfloat16": lambda s: scoring.narrowed(s, "bfloat16", ("scores", "weights")),
    "queries and keys are quantized to 8 bits token by token, symmetric": lambda s: replace(
        s, q=EIGHT_BITS(s.q), k=EIGHT_BITS(s.k)
    ),
    "keys and values before this pass are quantized to 8 bits token by token, symmetric": lambda s: replace(
        s, k=before_this_pass(EIGHT_BITS, s.k), v=before_this_pass(EIGHT_BITS, s.v)
    ),
    "the softmax is computed in bfloat16": lambda s: scoring.softmax_in(s, "bfloat16"),
    "zeros behind the last key, up to a multiple of 128, are seen too": scoring.padded(128, False),
}


def test_a_number_that_the_count_of_keys_makes_is_told_by_it():
    component, other = attention(0), attention(1, past=30)
    change = lambda s: scoring.scaled(np.log(s.mask.shape[1]) / np.log(512))(s)  # noqa: E731
    told = {law.sentence: law for law in laws.attention(component, attended(component, change))}
    law = told["scores are ln(number of keys) / ln(512) times as large"]
    np.testing.assert_allclose(law.apply(other), attended(other, change), atol=1e-5)


@pytest.mark.parametrize("sentence", CHANGES)
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_attended_otherwise_is_read_from_the_result(sentence, seed):
    component = attention(seed)
    assert best(laws.attention, component, attended(component, CHANGES[sentence])).sentence == sentence


def test_keys_ahead_and_queries_from_one_on_are_told():
    component = attention(2, past=0, rows=40, causal=True)
    ahead = masked(lambda seen, q, k: seen | (k <= q + 2))
    assert best(laws.attention, component, attended(component, ahead)).sentence == "a query also sees 2 keys after it"
    component = attention(3)
    window = masked(lambda seen, q, k: seen & (q - k < 8))
    late = lambda s: np.where((s.rows >= 5)[:, None], made(window, s), s.attended())  # noqa: E731
    words = "keys more than 7 tokens back are not seen, from query 5 on"
    assert best(laws.attention, component, attended(component, late)).sentence == words


def test_slopes_of_heads_are_told_one_by_one_and_hold_elsewhere():
    slopes = np.array([0.25, 0.0625, 2.0**-6, 2.0**-8])[:, None, None]
    component, other = attention(0), attention(5, past=30, rows=10)
    law = best(laws.attention, component, attended(component, scoring.biased(slopes)))
    assert law.sentence.startswith("scores fall by 0.25 in head 0, 0.0625 in head 1")
    np.testing.assert_allclose(law.apply(other), attended(other, scoring.biased(slopes)), atol=1e-4)


def test_keys_and_values_of_another_layer_are_recognised():
    component, other = attention(0), attention(1)
    given = (other.inputs["k"], other.inputs["v"], component.inputs["mask"])
    component.facts["others"]["layer 0"] = given
    for words, use_k, use_v in (("keys and values", 1, 1), ("values", 0, 1)):
        got = attended(component, scoring.of_another("layer 0", use_k, use_v))
        assert best(laws.attention, component, got).sentence == f"{words} are those of layer 0"


def test_attention_is_seen_through_the_product_behind_it_and_in_bfloat16():
    component = attention(0, weight=True)
    assert component.own.ndim == 2
    for words in ("scores are capped at 2 by tanh", "the first key is not seen"):
        assert best(laws.attention, component, attended(component, CHANGES[words])).sentence == words
    component = attention(0, dtype="bfloat16")
    for words in ("scores are capped at 2 by tanh", "keys more than 15 tokens back are not seen"):
        got = attended(component, CHANGES[words], "bfloat16")
        assert best(laws.attention, component, got).sentence == words


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_read_where_nothing_is_wrong_or_all_is_noise(seed, dtype):
    rng = np.random.default_rng(seed)
    for fitter, component in (
        (turns.rotary, rotary(seed, dtype=dtype)),
        (laws.attention, attention(seed, dtype=dtype)),
    ):
        assert list(fitter(component, component.own)) == []
        noise = rng.standard_normal(component.own.shape) * component.own.std()
        rounding = component.rounding / np.linalg.norm(noise) * noise
        assert list(fitter(component, (component.own + 0.9 * rounding).astype(np.float32))) == []
        for part in (0.05, 1.0):
            assert list(fitter(component, (component.own + part * noise).astype(np.float32))) == []


def capped(target):
    """Scores of one layer capped at 2 by tanh."""

    def attend(original, module, queries, kv, causal):
        groups = queries.shape[1] // kv.keys.shape[1]
        k, v = (mx.repeat(x, groups, axis=1).swapaxes(0, 1) for x in kv)
        scores = 2 * mx.tanh(queries.swapaxes(0, 1) @ k.swapaxes(1, 2) * queries.shape[-1] ** -0.5 / 2)
        n, m = scores.shape[1:]
        seen = mx.array(np.tri(n, m, m - n, dtype=bool)) if causal else mx.ones((n, m), mx.bool_)
        return (mx.softmax(mx.where(seen, scores, -mx.inf), axis=-1) @ v).swapaxes(0, 1)

    return calls(ScaledDotProductAttention, attend, "layers.1.self_attn.sdpa")(target)


def test_a_port_that_caps_its_scores_is_told_so(localized):
    fault = Fault("capped", "Scores are capped.", "layers.1.self_attn.sdpa", capped)
    finding = localized("t2i-fp32-kv", fault, thorough=False).findings[0]
    assert finding.component == "layers.1.self_attn.sdpa"
    assert finding.explanations[0].name == "scores are capped at 2 by tanh"


def test_degenerate_inputs_yield_nothing():
    for fitter, component in ((turns.rotary, rotary()), (laws.attention, attention())):
        assert list(fitter(component, np.full_like(component.own, np.nan))) == []
        assert list(fitter(component, component.own[:-1])) == []
        assert list(fitter(replace(component, inputs={}), component.own + 1)) == []
        zeros = replace(component, own=0 * component.own, inputs={n: 0 * x for n, x in component.inputs.items()})
        list(fitter(zeros, component.own))
    one = attention(0, past=0, rows=1)
    list(laws.attention(one, one.own + 1))
    one = rotary(0, rows=1)
    list(turns.rotary(one, one.own + 1))
