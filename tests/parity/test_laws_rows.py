"""Laws of what works row by row, read from synthetic inputs, weights and faults."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from parity.laws import Component, fitted
from parity.laws.curves import FUNCTIONS
from parity.laws.rounding import grids, to_format

SEEDS = range(2)
ROUNDING = {"float32": 3e-7, "bfloat16": 3e-3}


def held(array, dtype):
    array = np.asarray(array, np.float64)
    return (to_format(array, "bfloat16") if dtype == "bfloat16" else array).astype(np.float32)


def components(kind, dtype="float32", seed=0, rows=24):
    """A component of a kind with all that is known of it."""
    r = np.random.default_rng(seed)
    if kind == "weight":
        return Component(kind, {}, {"name": "weight"}, held(r.standard_normal((96, 64)) * 0.05, dtype))
    if kind == "sum":
        names = ("the stream", "the attention branch", "the MLP branch")
        inputs = {name: held(r.standard_normal((rows, 64)), dtype) for name in names}
        inputs["the normed stream"] = held(r.standard_normal((rows, 64)), dtype)
        own = sum(inputs[name].astype(np.float64) for name in names)
        return made(kind, inputs, {"terms": names}, own, dtype)
    if kind == "norm":
        x = held(r.standard_normal((rows, 4, 16)) * np.exp(r.standard_normal((rows, 1, 1))) * 0.1 + 0.02, dtype)
        facts = {"weight": held(1 + 0.3 * r.standard_normal(16), dtype), "eps": 1e-6}
        return made(kind, {"x": x}, facts, normed(x, facts["weight"]), dtype)
    x = held(r.standard_normal((rows, 64)) * np.exp(0.5 * r.standard_normal(64)), dtype)
    facts = {"weight": held(r.standard_normal((96, 64)) * 0.1, dtype), "bias": held(r.standard_normal(96) * 0.1, dtype)}
    inputs = {"x": x}
    if kind == "gated":
        gate, up = (held(1.5 * r.standard_normal((rows, 64)), dtype) for _ in range(2))
        inputs = {"x": held(silu(gate) * up, dtype), "gate": gate, "up": up}
        facts["activation"] = "SiLU"
    return made(kind, inputs, facts, inputs["x"].astype(np.float64) @ facts["weight"].T + facts["bias"], dtype)


def made(kind, inputs, facts, own, dtype):
    own = held(own, dtype)
    return Component(kind, inputs, facts, own, ROUNDING[dtype] * float(np.linalg.norm(own)))


def normed(x, weight, eps=1e-6):
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * weight


def silu(x):
    return FUNCTIONS["SiLU"](np.asarray(x, np.float64))


def first(component, got, dtype="float32"):
    """The shortest law of what was computed, held as the dtype holds it; checked to be what was computed."""
    got = held(got, dtype)
    laws = fitted(component, got)
    assert laws, "no law"
    residual = np.linalg.norm(got - component.own)
    left = np.linalg.norm(laws[0].apply(component) - got)
    assert left <= max(0.05 * residual, 1.5 * component.rounding, 2e-7 * np.linalg.norm(got))
    return laws[0].sentence


def where(array, index, value):
    array = np.array(array, np.float64)
    array[index] = value(array[index])
    return array


KINDS = ("linear", "weight", "norm", "gated", "sum")


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_of_what_is_right_or_of_noise(kind, dtype):
    for seed in SEEDS:
        component = components(kind, dtype, seed)
        noise = np.random.default_rng(seed + 9).standard_normal(component.own.shape)
        scale = float(np.std(component.own))
        assert fitted(component, component.own.copy()) == []
        if component.rounding:
            rounded = component.own + noise * 0.5 * component.rounding / noise.size**0.5
            assert fitted(component, rounded.astype(np.float32)) == []
        assert fitted(component, held(component.own + 0.3 * scale * noise, dtype)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_data_raises_nothing(kind):
    component = components(kind)
    own = component.own
    bad = [np.full_like(own, np.nan), np.zeros_like(own), own[:-1], own[:0], own.ravel(), np.full_like(own, np.inf)]
    for got in bad:
        fitted(component, got)
    for part in (1, 2):
        small = components(kind, rows=part)
        fitted(small, small.own + np.float32(0.1) * small.own[::-1])
    fitted(Component(kind, {}, {}, own, 0.0), own * 2)
    zeros = Component(kind, {n: a * 0 for n, a in component.inputs.items()}, component.facts, own * 0, 0.0)
    fitted(zeros, own)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("sentence", "change"),
    [
        ("the result is 1.25 times as large", lambda y: 1.25 * y),
        ("the result is 0 in channel 7 alone", lambda y: where(y, np.s_[:, 7], lambda v: 0 * v)),
        ("the result is 0 in channels 32 to 47", lambda y: where(y, np.s_[:, 32:48], lambda v: 0 * v)),
        ("the result is negated from row 12 on", lambda y: where(y, np.s_[12:], lambda v: -v)),
        ("the result's row 5 is a copy of the row before it", lambda y: where(y, 5, lambda v: y[4])),
        ("the result's rows are rolled by 1", lambda y: np.roll(y, 1, 0)),
        ("the result's channels 0 to 15 and 16 to 31 are exchanged", lambda y: y[:, np.r_[16:32, 0:16, 32:96]]),
        ("the result's channels of every 32 are read as 2 x 16 transposed",
         lambda y: y.reshape(-1, 3, 2, 16).swapaxes(2, 3).reshape(y.shape)),
        ("the result is clamped to [-1, 1]", lambda y: np.clip(y, -1, 1)),
        ("the result is capped by 2 tanh(x / 2)", lambda y: 2 * np.tanh(y / 2)),
    ],
)  # fmt: skip
def test_results_of_products(sentence, change, seed, dtype):
    component = components("linear", dtype, seed)
    assert first(component, change(component.own.astype(np.float64)), dtype) == sentence


INPUTS = [
    ("the input is clamped to [-1.5, 1.5]", lambda x: np.clip(x, -1.5, 1.5)),
    ("the input is rounded to float8_e4m3", lambda x: to_format(x, "float8_e4m3")),
    ("the input passes ReLU", lambda x: np.maximum(x, 0)),
    ("the input's channels are rolled by 1", lambda x: np.roll(x, 1, 1)),
    ("the input's channels are read as 2 x 32 transposed",
     lambda x: x.reshape(-1, 2, 32).swapaxes(1, 2).reshape(x.shape)),
    ("the input is 0.5 times as large from channel 32 on", lambda x: x * np.where(np.arange(64) < 32, 1, 0.5)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("sentence", "change"), INPUTS)
def test_inputs_of_products(sentence, change, dtype):
    for seed in SEEDS:
        component = components("linear", dtype, seed)
        x = change(component.inputs["x"].astype(np.float64))
        assert first(component, x @ component.facts["weight"].T + component.facts["bias"], dtype) == sentence


def low_rank(seed, rank):
    r = np.random.default_rng(seed + 50)
    return 0.05 * r.standard_normal((96, rank)) @ r.standard_normal((rank, 64))


GRIDS = {words: how for words, _, how in grids(64)}
Q4 = "is quantized to 4 bits in groups of 32"
WEIGHTS = [
    ("the weight differs by a matrix of rank 3", lambda w: w + low_rank(0, 3)),
    ("the weight is transposed in memory", lambda w: w.T.reshape(w.shape)),
    (f"the weight {Q4}", lambda w: GRIDS[Q4](w)),
    ("the weight is quantized to mxfp4", lambda w: GRIDS["is quantized to mxfp4"](w)),
    ("the weight is rounded to float8_e4m3", lambda w: to_format(w, "float8_e4m3")),
]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("sentence", "change"), WEIGHTS)
def test_weights_of_products(sentence, change, dtype):
    for seed in SEEDS:
        component = components("linear", dtype, seed)
        weight = change(component.facts["weight"].astype(np.float64))
        got = component.inputs["x"].astype(np.float64) @ weight.T + component.facts["bias"]
        assert first(component, got, dtype) == sentence


def test_part_of_a_weight_of_a_product():
    component = components("linear")
    weight = component.facts["weight"].astype(np.float64)
    x, bias = component.inputs["x"].astype(np.float64), component.facts["bias"]
    one = where(weight, np.s_[5, 6], lambda v: 0.7)
    assert first(component, x @ one.T + bias).startswith("the weight of input 6 is 0.7 instead of ")
    assert first(component, x @ where(weight, np.s_[:, 9], lambda v: 0 * v).T + bias) == "the weight of input 9 is 0"
    some = where(weight, np.s_[:16], GRIDS[Q4])
    assert first(component, x @ some.T + bias) == f"the weight {Q4} up to channel 15"
    # Where there are rows enough any matrix can be read.
    wide = components("linear", rows=400)
    shuffled = wide.facts["weight"].astype(np.float64)[:, np.random.default_rng(1).permutation(64)]
    got = wide.inputs["x"].astype(np.float64) @ shuffled.T + wide.facts["bias"]
    assert "inputs are in another order" in first(wide, got)


@pytest.mark.parametrize("seed", SEEDS)
def test_biases_of_products(seed):
    component = components("linear", seed=seed)
    bias = component.facts["bias"].astype(np.float64)
    product = component.own - bias
    assert first(component, product) == "the bias is missing"
    assert first(component, product + 2 * bias) == "the bias is 2 times as large"
    assert first(component, product + np.roll(bias, 1)) == "the bias's channels are rolled by 1"
    assert first(component, 1.02 * product + bias) == "the product is 1.02 times as large, but not the bias"
    assert first(component, product + where(bias, 3, lambda v: 0)).startswith("the bias is 0 instead of ")
    other = np.random.default_rng(seed + 7).standard_normal(96)
    described = {law.sentence: law.describes for law in fitted(component, held(product + other, "float32"))}
    assert described["the bias is another vector"] and not fitted(component, held(product, "float32"))[0].describes


def test_two_faults_are_not_told_as_a_matrix():
    component = components("linear")
    product = component.own.astype(np.float64) - component.facts["bias"]
    said = first(component, where(product, np.s_[:, 40], lambda v: 1.5 * v))
    assert said == "the bias is missing, and the result is 1.5 times as large in channel 40 alone"


def test_a_law_holds_of_another_call_of_the_component():
    first_call, second = components("linear", seed=1), components("linear", seed=1, rows=40)
    law = fitted(first_call, first_call.own * np.float32([1] * 95 + [3]))[0]
    assert law.sentence == "the result is 3 times as large in channel 95 alone"
    assert np.allclose(law.apply(second), second.own * np.float32([1] * 95 + [3]), rtol=1e-5)
    # Of another shape it says nothing.
    assert law.apply(replace(second, own=second.own[:, :64])) is None


@pytest.mark.parametrize(
    ("sentence", "change"),
    [
        ("the weight is 1.01 times as large", lambda w: w * np.float32(1.01)),
        ("the weight is 0 in outputs 32 to 63", lambda w: where(w, np.s_[32:64], lambda v: 0 * v)),
        ("the weight is negated in input 3 alone", lambda w: where(w, np.s_[:, 3], lambda v: -v)),
        ("the weight is 1 larger", lambda w: w + np.float32(1)),
        ("the weight's outputs are reversed", lambda w: w[::-1]),
        ("the weight's outputs 0 to 15 and 16 to 31 are exchanged", lambda w: w[np.r_[16:32, 0:16, 32:96]]),
        ("the weight is rounded to float16", lambda w: w.astype(np.float16)),
        ("the weight is rounded to bfloat16", lambda w: to_format(w.astype(np.float64), "bfloat16")),
        ("the weight is clamped to [-0.1, 0.1]", lambda w: np.clip(w, -0.1, 0.1)),
        ("the weight differs by a matrix of rank 3", lambda w: w + low_rank(0, 3)),
        (f"the weight {Q4}", lambda w: GRIDS[Q4](w.astype(np.float64))),
    ],
)
def test_parameters(sentence, change):
    for seed in SEEDS:
        component = components("weight", seed=seed)
        assert first(component, change(component.own)) == sentence


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_as_mlx_quantizes_them(dtype, bits):
    own = held(np.random.default_rng(bits).standard_normal((40, 128)), dtype)
    kept = mx.quantize(mx.array(own).astype(getattr(mx, dtype)), 32, bits)
    got = np.array(mx.dequantize(*kept, 32, bits).astype(mx.float32))
    component = Component("weight", {}, {"name": "weight"}, own)
    law = fitted(component, got)[0]
    assert law.sentence == f"the weight is quantized to {bits} bits in groups of 32, zero kept"
    assert np.array_equal(law.apply(component), got)


def test_parameters_of_bfloat16_that_were_quantized_in_float32():
    component = components("weight", "bfloat16")
    words = "is quantized to 4 bits in groups of 32, zero kept, in steps of float32"
    assert first(component, GRIDS[words](component.own), "bfloat16") == f"the weight {words}"


@pytest.mark.parametrize("dtype", ROUNDING)
def test_of_a_parameter_that_was_changed_twice_the_grid_is_read_and_then_the_rest(dtype):
    component = components("weight", dtype)
    kept = GRIDS[f"{Q4}, zero kept, in steps of float32"](component.own)
    got = held(kept + 0.05 * low_rank(0, 2), dtype)
    law = fitted(component, got)[0]
    assert law.sentence.startswith(f"the weight {Q4}, zero kept")
    rest = replace(component, own=law.apply(component).astype(np.float32))
    assert first(rest, got, dtype) == "the weight differs by a matrix of rank 2"


def test_inputs_that_are_left_out_are_told_though_others_are_too_small_to_tell():
    component = components("linear", "bfloat16", rows=120)
    r = np.random.default_rng(1)
    x = held(r.standard_normal((120, 64)) * np.exp(2.5 * r.standard_normal(64)), "bfloat16")
    facts, product = component.facts, x.astype(np.float64) @ component.facts["weight"].astype(np.float64).T
    given = made("linear", {"x": x}, facts, product + facts["bias"], "bfloat16")
    kept = np.where(np.arange(64) < 60, x, 0).astype(np.float64)
    got = kept @ facts["weight"].T + facts["bias"]
    assert first(given, got, "bfloat16") == "the input is left out from channel 60 on"


def test_kernels():
    kernel = np.random.default_rng(0).standard_normal((8, 6, 3, 3, 3)).astype(np.float32)
    component = Component("weight", {}, {"name": "weight"}, kernel)
    assert first(component, kernel[..., ::-1, ::-1]) == "the weight's rows and columns are reversed"
    assert first(component, np.moveaxis(kernel, 1, -1).reshape(kernel.shape)) == "the weight is read channels first"
    assert first(component, where(kernel, np.s_[:, :, 2], lambda v: 0 * v)) == "the weight is 0 in frame 2 alone"


NORMS = [
    ("eps is 0.001 instead of 1e-6", lambda x, w: normed(x, w, 1e-3)),
    ("eps 0.002 is added to the root", lambda x, w: x / (rms(x) + 0.002) * w),
    ("the weight counts from 1", lambda x, w: normed(x, w + 1)),
    ("the weight is missing", lambda x, w: normed(x, 1)),
    ("the weight's channels are reversed", lambda x, w: normed(x, w[::-1])),
    ("the norm is missing", lambda x, w: x),
    ("the mean is subtracted", lambda x, w: normed(x - x.mean(-1, keepdims=True), w)),
    ("0.5 times the mean is subtracted first", lambda x, w: normed(x - 0.5 * x.mean(-1, keepdims=True), w)),
    ("x is divided by its mean absolute value", lambda x, w: x / np.abs(x).mean(-1, keepdims=True) * w),
    ("the power is -0.4 instead of -1/2", lambda x, w: x / (rms(x) ** 2 + 1e-6) ** 0.4 * w),
    ("the mean is over heads and channels", lambda x, w: x / rms(x, (-1, -2)) * w),
    ("groups of 8 channels are normed by themselves",
     lambda x, w: (x.reshape(-1, 4, 2, 8) / rms(x.reshape(-1, 4, 2, 8))).reshape(x.shape) * w),
    ("the mean is over the first 8 channels", lambda x, w: x / rms(x[..., :8]) * w),
    ("the mean square is at least 0.01", lambda x, w: x / np.maximum(rms(x), 0.1) * w),
    ("the mean is subtracted and the weight is missing", lambda x, w: normed(x - x.mean(-1, keepdims=True), 1)),
    ("eps is 0.01 instead of 1e-6 and the result is 1.5 times as large", lambda x, w: 1.5 * normed(x, w, 1e-2)),
]  # fmt: skip


def rms(x, axes=-1):
    return np.sqrt(np.square(x).mean(axes, keepdims=True))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("sentence", "change"), NORMS)
def test_norms(sentence, change, dtype):
    for seed in SEEDS[:2]:
        component = components("norm", dtype, seed)
        x, weight = component.inputs["x"].astype(np.float64), component.facts["weight"].astype(np.float64)
        assert first(component, change(x, weight), dtype) == sentence


def test_parts_of_norms():
    component = components("norm")
    x, weight = component.inputs["x"].astype(np.float64), component.facts["weight"].astype(np.float64)
    own = normed(x, weight)
    larger = where(own, np.s_[:, 2], lambda v: 1.01 * v)
    assert first(component, larger) == "the result is 1.01 times as large in head 2 alone"
    one = where(own, np.s_[:, 1], lambda v: normed(x, weight, 3e-3)[:, 1])
    assert first(component, one) == "eps is 0.003 instead of 1e-6 in head 1 alone"
    assert first(component, where(own, 3, lambda v: x[3])) == "the norm is missing in row 3 alone"
    assert first(component, own * (15 / 16) ** 0.5) == "the mean is over one channel less"


def test_norms_of_images():
    r = np.random.default_rng(0)
    x = r.standard_normal((1, 32, 2, 6, 5)) * np.exp(r.standard_normal((1, 1, 2, 6, 5)))
    gamma = 1 + 0.3 * r.standard_normal(32)

    def computed(weight, eps=0.0):
        length = np.sqrt(np.square(x).mean(1, keepdims=True) + eps)
        return x / length * weight.reshape(1, -1, 1, 1, 1)

    facts = {"weight": gamma.astype(np.float32), "eps": 0.0, "axis": 1}
    component = made("norm", {"x": x.astype(np.float32)}, facts, computed(gamma), "float32")
    assert first(component, computed(gamma + 1)) == "the weight counts from 1"
    assert first(component, computed(gamma, 1e-2)) == "eps is 0.01 instead of 0"
    half = where(component.own, np.s_[:, :, :, 1:], lambda v: 0.5 * v)
    assert first(component, half) == "the result is 0.5 times as large from image row 1 on"


ACTIVATIONS = [
    *((f"the gate passes {name} instead of SiLU", lambda g, u, f=f: f(g) * u)
      for name, f in FUNCTIONS.items() if name not in ("SiLU", "nothing")),
    ("the gate is not activated", lambda g, u: g * u),
    ("the gate passes SiLU with beta 1.3 instead of SiLU", lambda g, u: silu(1.3 * g) / 1.3 * u),
    ("the gate passes a leaky ReLU of slope 0.1 instead of SiLU", lambda g, u: np.where(g > 0, g, 0.1 * g) * u),
    ("the gate is clamped to [-0.5, 0.5]", lambda g, u: silu(np.clip(g, -0.5, 0.5)) * u),
    ("up is clamped to [-1, 1]", lambda g, u: silu(g) * np.clip(u, -1, 1)),
    ("up is 1 larger", lambda g, u: silu(g) * (u + 1)),
    ("the activation is on up instead of the gate", lambda g, u: g * silu(u)),
    ("gate and up both pass SiLU", lambda g, u: silu(g) * silu(u)),
    ("the product of gate and up passes SiLU", lambda g, u: silu(g * u)),
    ("up counts from 1, and the gate passes quick GELU", lambda g, u: FUNCTIONS["quick GELU"](g) * (u + 1)),
    ("up, and not the gate, passes GELU", lambda g, u: FUNCTIONS["GELU"](u) * g),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "change"), ACTIVATIONS)
def test_activations(sentence, change):
    for dtype in ROUNDING:
        component = components("gated", dtype)
        gate, up = (component.inputs[name].astype(np.float64) for name in ("gate", "up"))
        got = change(gate, up) @ component.facts["weight"].astype(np.float64).T + component.facts["bias"]
        if dtype == "float32" or "tanh GELU" not in sentence:
            assert first(component, got, dtype) == sentence


def test_any_function_of_a_gate_is_drawn():
    component = components("gated", rows=60)
    gate, up = (component.inputs[name].astype(np.float64) for name in ("gate", "up"))
    weight, bias = component.facts["weight"].astype(np.float64), component.facts["bias"]
    law = fitted(component, held((np.sin(gate) * up) @ weight.T + bias, "float32"))[0]
    assert law.sentence == "the gate passes another function instead of SiLU" and law.figure is not None
    assert law.describes
    assert np.allclose(law.figure.lines["found"], np.sin(law.figure.x), atol=0.1)
    late = where(component.own, np.s_[9:], lambda v: ((np.maximum(gate, 0) * up) @ weight.T + bias)[9:])
    assert first(component, late) == "the gate passes ReLU instead of SiLU from row 9 on"
    # What comes after the activation may be wrong too.
    assert first(component, component.own - bias) == "the bias is missing"


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("sentence", "numbers"),
    [
        ("the MLP branch is added 0.5 times", (1, 1, 0.5, 0)),
        ("the stream is not added", (0, 1, 1, 0)),
        ("the stream is added twice", (2, 1, 1, 0)),
        ("the attention branch is taken with the other sign", (1, -1, 1, 0)),
        ("the normed stream is added too", (1, 1, 1, 1)),
    ],
)
def test_sums(sentence, numbers, dtype):
    component = components("sum", dtype)
    parts = [array.astype(np.float64) for array in component.inputs.values()]
    assert first(component, sum(a * part for a, part in zip(numbers, parts, strict=True)), dtype) == sentence


def test_parts_of_sums():
    component = components("sum")
    stream, attended, fed, _ = (array.astype(np.float64) for array in component.inputs.values())
    assert first(component, where(component.own, np.s_[5:], lambda v: v - fed[5:])) == (
        "the MLP branch is not added from row 5 on"
    )
    assert first(component, stream + np.roll(attended, 1, 0) + fed) == "the attention branch's rows are rolled by 1"
    # Of two that are added otherwise both are told.
    said = first(component, stream + 0.7 * attended + 0.7 * fed)
    assert "the attention branch is added 0.7 times" in said and "the MLP branch is added 0.7 times" in said


# The blind faults are read from runs as well.
@pytest.mark.exhaustive
def test_faults_that_nobody_wrote_down_are_read_from_a_run(localized):
    found = {finding.component: finding for finding in localized("t2i-fp32-kv", *broken(), thorough=False).findings}
    said = {component: finding.explanations[0].name for component, finding in found.items()}
    assert said == {
        "layers.0.self_attn.k_proj": "the weight is 1.1 times as large in outputs 4 to 7",
        "layers.0.mlp.down_proj": "the gate passes SiLU with beta 1.3 instead of SiLU",
        "layers.1.mlp_moe_gen.up_proj": "the weight differs by a matrix of rank 2",
    }
    assert all(finding.explained for finding in found.values())


def broken():
    """A few faults of a port, in the language model."""
    import mlx.core as mx

    from lance_mlx.model.layers import MLP, Linear
    from parity.lance.faults.base import Fault, calls, parameter

    r = np.random.default_rng(0)
    down, up = (mx.array(0.1 * r.standard_normal(shape).astype(np.float32)) for shape in ((64, 2), (2, 96)))

    def larger(target):
        (module,) = target.modules("layers.0.self_attn.k_proj").values()
        weight = module.weight
        return parameter(module, "weight", mx.concatenate([weight[:4], 1.1 * weight[4:8], weight[8:]]))

    def gated(original, module, x):
        gate = module.gate_proj(x)
        return module.down_proj(gate * mx.sigmoid(1.3 * gate) * module.up_proj(x))

    def adapted(original, module, x):
        return original(module, x) + x @ down @ up

    patches = {
        "layers.0.self_attn.k_proj": larger,
        "layers.0.mlp.down_proj": calls(MLP, gated, "layers.0.mlp"),
        "layers.1.mlp_moe_gen.up_proj": calls(Linear, adapted, "layers.1.mlp_moe_gen.up_proj"),
    }
    return [Fault(f"broken-{i}", "Broken.", name, patch) for i, (name, patch) in enumerate(patches.items())]
