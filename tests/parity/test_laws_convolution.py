"""Laws of a convolution: where it reads, what stands outside and before, which parts of its kernel count otherwise."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from parity.laws import Component, fitted
from parity.laws.rounding import DTYPES

AXES = ("batch", "channel", "frame", "row", "column")
HISTORY = 2
SAME = ((1, 1), (1, 1))


def convolve(x, weight, bias, pads=SAME, stride=(1, 1, 1), mode="constant", dilation=(1, 1, 1), value=None):
    (above, below), (left, right) = pads
    x, weight = (torch.tensor(np.ascontiguousarray(array)) for array in (x, weight))
    x = F.pad(x, (left, right, above, below, 0, 0), mode, *([value] if value is not None else []))
    return F.conv3d(x, weight, None if bias is None else torch.tensor(bias), stride, dilation=dilation).numpy()


def component(seed=0, inner=16, outer=12, frames=2, kernel=(3, 3, 3), size=(8, 10), stride=(1, 1, 1), pads=SAME):
    rng = np.random.default_rng(seed)
    history = kernel[0] - 1
    x = rng.standard_normal((1, inner, frames + history, *size)).astype(np.float32)
    weight = rng.standard_normal((outer, inner, *kernel)).astype(np.float32) / np.float32(
        np.sqrt(inner * np.prod(kernel))
    )
    bias = (0.3 * rng.standard_normal(outer)).astype(np.float32)
    own = convolve(x, weight, bias, pads, stride)
    facts = {"weight": weight, "bias": bias, "stride": stride, "pads": pads, "history": history}
    return Component("convolution", {"x": x}, facts, own, 5e-7 * float(np.linalg.norm(own)), AXES)


def parts(given):
    return given.inputs["x"], given.facts["weight"], given.facts["bias"]


def put(array, where, values):
    changed = array.copy()
    changed[where] = values(changed[where]) if callable(values) else values
    return changed


def best(given, got):
    def left(law):
        values = law.apply(given)
        return np.inf if values is None else float(np.linalg.norm(got - values.astype(np.float64)))

    laws = sorted(fitted(given, got), key=lambda law: (max(left(law), 4 * given.rounding), law.size))
    return (laws[0], left(laws[0])) if laws else (None, np.inf)


def history(change):
    return lambda x, w, b: convolve(np.concatenate([change(x), x[:, :, HISTORY:]], 2), w, b)


CHANGES = {
    "the convolution repeats the border": lambda x, w, b: convolve(x, w, b, mode="replicate"),
    "the convolution mirrors at the border's values": lambda x, w, b: convolve(x, w, b, mode="reflect"),
    "the convolution pads with the opposite border": lambda x, w, b: convolve(x, w, b, mode="circular"),
    "the convolution pads with -1": lambda x, w, b: convolve(x, w, b, value=-1.0),
    "the convolution reads 1 row higher": lambda x, w, b: convolve(x, w, b, ((2, 0), (1, 1))),
    "the convolution reads 1 column further right": lambda x, w, b: convolve(x, w, b, ((1, 1), (0, 2))),
    "the input's rows are rolled by 1": lambda x, w, b: convolve(np.roll(x, 1, 3), w, b),
    "the input is 0.5 more": lambda x, w, b: convolve(x + np.float32(0.5), w, b),
    "the input counts 1.1 times": lambda x, w, b: convolve(x * np.float32(1.1), w, b),
    "the kernel is reversed in time": lambda x, w, b: convolve(x, w[:, :, ::-1], b),
    "the kernel is reversed in rows and columns": lambda x, w, b: convolve(x, w[..., ::-1, ::-1], b),
    "the kernel's rows and columns are exchanged": lambda x, w, b: convolve(x, w.swapaxes(3, 4), b),
    "the kernel is dilated by 2": lambda x, w, b: convolve(x, w, b, ((2, 2), (2, 2)), dilation=(1, 2, 2)),
    "the convolution takes zeros for the frames before": history(lambda x: 0 * x[:, :, :2]),
    "the convolution repeats the present's first frame before it": history(lambda x: x[:, :, [2, 2]]),
    "the convolution takes the frame before for all earlier ones": history(lambda x: x[:, :, [1, 1]]),
    "the convolution reads the frames before in reverse": history(lambda x: x[:, :, [1, 0]]),
    "the convolution remembers the frame before alone": history(lambda x: put(x[:, :, :2], np.s_[:, :, 0], 0)),
    "the convolution reads 1 frame ahead, zeros after the present": lambda x, w, b: convolve(
        np.concatenate([x[:, :, 1:], 0 * x[:, :, :1]], 2), w, b
    ),
    "the convolution reads the present's frames in reverse": lambda x, w, b: convolve(x[:, :, [0, 1, 3, 2]], w, b),
    "the bias is missing": lambda x, w, b: convolve(x, w, None),
    "the bias counts 2 times": lambda x, w, b: convolve(x, w, 2 * b),
    "input channel 3 is left out": lambda x, w, b: convolve(x, put(w, np.s_[:, 3], 0), b),
    "input channels 3 and 7 are counted 1.05 times": lambda x, w, b: convolve(
        x, put(w, np.s_[:, [3, 7]], lambda v: v * np.float32(1.05)), b
    ),
    "kernel frame 0 is left out": lambda x, w, b: convolve(x, put(w, np.s_[:, :, 0], 0), b),
    "the kernel's tap (1, 0, 2) is left out": lambda x, w, b: convolve(x, put(w, np.s_[:, :, 1, 0, 2], 0), b),
    "input channels 2 and 9 are exchanged": lambda x, w, b: convolve(put(x, np.s_[:, [2, 9]], x[:, [9, 2]]), w, b),
    "input channel 4 is read from channel 3": lambda x, w, b: convolve(put(x, np.s_[:, 4], x[:, 3]), w, b),
    "input channels are reversed": lambda x, w, b: convolve(x[:, ::-1], w, b),
}


@pytest.mark.parametrize("sentence", CHANGES)
def test_what_a_convolution_does_is_told(sentence):
    seed = len(sentence)
    given = component(seed)
    got = CHANGES[sentence](*parts(given))
    law, left = best(given, got)
    assert law is not None and law.sentence == sentence
    assert left <= 4 * given.rounding
    # It is computed anew from what another call is given.
    other = component(seed + 50)
    expected = CHANGES[sentence](*parts(other))
    assert np.linalg.norm(law.apply(other) - expected) <= 4 * other.rounding


@pytest.mark.parametrize(
    ("sentence", "change"),
    [
        ("the convolution reads its input as bfloat16", lambda x, w, b, to: convolve(to(x), w, b)),
        ("the convolution rounds its kernel to bfloat16", lambda x, w, b, to: convolve(x, to(w), b)),
        ("the convolution multiplies in bfloat16", lambda x, w, b, to: convolve(to(x), to(w), b)),
    ],
)
def test_the_dtype_of_a_product_is_told(sentence, change):
    given = component()
    got = change(*parts(given), lambda array: DTYPES["bfloat16"](array).astype(np.float32))
    assert best(given, got)[0].sentence == sentence


def test_a_part_of_the_result_is_told_apart():
    given = component()
    x, w, b = parts(given)
    flipped, repeated = convolve(x, w[..., ::-1, ::-1], b), convolve(x, w, b, mode="replicate")
    law, left = best(given, put(given.own, np.s_[:, 5], flipped[:, 5]))
    assert law.sentence == "in channel 5 the kernel is reversed in rows and columns" and left <= 4 * given.rounding
    law, _ = best(given, put(given.own, np.s_[:, :, 1:], repeated[:, :, 1:]))
    assert law.sentence == "in frame 1 the convolution repeats the border"


@pytest.mark.parametrize(
    ("pads", "mode", "sentence"),
    [
        (((1, 0), (1, 0)), "constant", "the convolution reads 1 row higher and 1 column further left"),
        (((0, 1), (0, 1)), "replicate", "the convolution repeats the border"),
    ],
)
def test_a_convolution_that_halves_the_picture(pads, mode, sentence):
    given = component(kernel=(1, 3, 3), frames=1, size=(16, 16), stride=(1, 2, 2), pads=((0, 1), (0, 1)))
    law, left = best(given, convolve(*parts(given), pads, (1, 2, 2), mode))
    assert law.sentence == sentence and left <= 4 * given.rounding


@pytest.mark.parametrize("seed", range(2))
def test_another_kernel_is_read_where_there_are_outputs_enough(seed):
    given = component(seed, inner=4, outer=6, frames=1, kernel=(1, 3, 3), size=(24, 32))
    x, w, b = parts(given)
    rng = np.random.default_rng(seed + 9)
    permuted = rng.permutation(4)
    while (permuted == np.arange(4)).sum() > 0 or (permuted[permuted] == np.arange(4)).all():
        permuted = rng.permutation(4)
    law, left = best(given, convolve(x, w[:, permuted], b))
    assert "input channels" in law.sentence and left <= 1e-4 * np.linalg.norm(given.own)
    law, left = best(given, convolve(x, w + 0.1 * rng.standard_normal(w.shape).astype(np.float32), b))
    assert law.sentence.startswith("the kernel is another: ") and left <= 1e-4 * np.linalg.norm(given.own)
    assert law.figure.panels["found"].shape == (6, 36)


@pytest.mark.parametrize("seed", range(2))
def test_clean_data_and_noise_have_no_law(seed):
    given, rng = component(seed), np.random.default_rng(seed + 7)
    assert fitted(given, given.own.copy()) == []
    for size in (1e-3, 0.1, 1.0):
        assert fitted(given, given.own + size * rng.standard_normal(given.own.shape).astype(np.float32)) == []
    wide = component(seed, inner=4, outer=6, frames=1, kernel=(1, 3, 3), size=(24, 32))
    assert fitted(wide, wide.own + 0.1 * rng.standard_normal(wide.own.shape).astype(np.float32)) == []


def test_data_that_say_little_do_not_raise():
    given = component()
    empty = Component("convolution", {}, {}, given.own, given.rounding, AXES)
    for got in (given.own[:, :3], np.full_like(given.own, np.nan), 0 * given.own, given.own[0]):
        for one in (given, empty):
            for law in fitted(one, got):
                law.apply(one)
    still = Component("convolution", {"x": 0 * given.inputs["x"]}, given.facts, 0 * given.own, 0.0, AXES)
    for law in fitted(still, given.own):
        law.apply(still)
