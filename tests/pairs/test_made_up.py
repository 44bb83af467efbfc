"""Pairs of small models made here: layouts, names, fused parts, what has no counterpart, bad files."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

from parity import ParityError, assert_pair_agrees, localize_pair
from parity.comparison.verdict import AGREE, DIVERGE, INCONCLUSIVE
from parity.pairs import Pair, Part, copy_weights
from parity.pairs.layouts import laid_out, put_back
from parity.pairs.names import distance, relative
from parity.pairs.pair import load_pair

HIDDEN, INNER, ROWS = 16, 24, 10


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(32, HIDDEN)
        self.conv = torch.nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1)
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.gate = torch.nn.Linear(HIDDEN, INNER)
        self.up = torch.nn.Linear(HIDDEN, INNER)
        self.down = torch.nn.Linear(INNER, HIDDEN)

    def forward(self, ids):
        x = self.embed(ids) * 4
        x = self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2))
        return x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


class Embedding(torch.nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 4


class ScaledInside(Torch):
    """The factor inside of the embedding's own module."""

    def __init__(self):
        super().__init__()
        self.embed = Embedding(32, HIDDEN)

    def forward(self, ids):
        x = self.norm(self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2))
        return x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


class Port(nn.Module):
    """Channels last, and gate and up in one product; the embedding is scaled as `scale` says."""

    def __init__(self, kernel=3, scale=4.0, half=2):
        super().__init__()
        self.embed, self.scale, self.half = nn.Embedding(32, HIDDEN), scale, half
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, kernel, padding=kernel // 2)
        self.norm = nn.LayerNorm(HIDDEN)
        self.gate_up = nn.Linear(HIDDEN, 2 * INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def __call__(self, ids):
        x = self.norm(self.conv(self.embed(ids) * self.scale))
        gate, up = mx.split(self.gate_up(x), self.half, -1)
        return x + self.down(nn.silu(gate) * up)


def pair(port=None, dtype=torch.float32, trusted=None, **more):
    torch.manual_seed(1)
    trusted = (Torch() if trusted is None else trusted).eval()
    for parameter in trusted.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    inputs = {"ids": np.random.default_rng(0).integers(0, 32, (1, ROWS))}
    made = Pair(
        trusted.to(dtype), Port() if port is None else port, inputs, **{"names": {"gate_up": ("gate", "up")}, **more}
    )
    copy_weights(made)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_port_in_another_layout_with_fused_parts_agrees(dtype):
    found = localize_pair(pair(dtype=dtype))
    assert found.verdict == AGREE, found.findings
    names = {tap.tap.name for tap in found.taps}
    assert {"run/embed", "run/conv", "run/gate", "run/up", "run/down:in", "run/output"} <= names
    assert {"weights/conv.weight", "weights/gate.weight", "weights/up.bias"} <= set(found.exact)
    assert_pair_agrees(pair(dtype=dtype))


def test_a_wrong_constant_is_found_where_it_is_used_and_an_assertion_names_it():
    found = localize_pair(pair(Port(scale=2.0)))
    assert found.verdict == DIVERGE and found.first.component == "conv (input)"
    assert len(found.findings) == 1 and "0.5" in found.first.explanations[0].name
    with pytest.raises(AssertionError, match="conv .input. is wrong first"):
        assert_pair_agrees(pair(Port(scale=2.0)))


def test_a_convolution_that_pads_on_one_side_alone():
    class Left(nn.Conv1d):
        def __call__(self, x):
            return super().__call__(mx.pad(x, ((0, 0), (2, 0), (0, 0))))

    port = Port()
    port.conv = Left(HIDDEN, HIDDEN, 3)
    found = localize_pair(pair(port))
    assert found.verdict == DIVERGE and found.first.component == "conv"
    assert found.first.explanations[0].name == "the convolution reads 1 column further left"


def test_what_is_computed_in_other_places_and_comes_out_right_is_told_and_no_finding():
    found = localize_pair(pair(trusted=ScaledInside()))
    assert found.verdict == AGREE and "all that comes of it is right: embed" in found.remark
    wrong = localize_pair(pair(Port(scale=2.0), trusted=ScaledInside()))
    assert wrong.verdict == DIVERGE


def test_wrong_weights_are_named_and_everything_else_is_judged_with_the_right_ones():
    made = pair()
    made.port.down.weight = made.port.down.weight * 1.05
    found = localize_pair(made)
    assert [finding.tap for finding in found.findings] == ["weights/down.weight"]
    assert "1.05 times" in found.first.explanations[0].name
    # What was put in for the run is taken out again.
    assert localize_pair(made).verdict == DIVERGE


def test_parts_of_a_fused_parameter():
    class Fused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.both = torch.nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)

        def forward(self, x):
            first, second = self.both(x).chunk(2, -1)
            return first * second

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(2))

        def __call__(self, x):
            return self.first(x) * self.second(x)

    x = {"x": np.random.default_rng(0).standard_normal((1, ROWS, HIDDEN)).astype(np.float32)}
    parts = {f"{name}.weight": Part("both.weight", number, 2) for number, name in enumerate(("first", "second"))}
    made = Pair(Fused().eval(), Split(), x, parts=parts)
    copy_weights(made)
    assert localize_pair(made).verdict == AGREE
    made.port.second.weight = made.port.first.weight
    found = localize_pair(made)
    assert found.verdict == DIVERGE and found.first.tap == "weights/both.weight[1]"


class Code:
    """Functions that are no modules."""

    @staticmethod
    def theirs(x):
        return torch.softmax(x, -1)

    @staticmethod
    def ours(x):
        return mx.softmax(2 * x, -1)


def test_functions_that_are_no_modules_are_compared_and_steered():
    class Trusted(torch.nn.Module):
        def forward(self, x):
            return Code.theirs(x) @ x

    class Routed(nn.Module):
        def __call__(self, x):
            return Code.ours(x) @ x

    x = {"x": np.random.default_rng(0).standard_normal((1, 8, 8)).astype(np.float32)}
    functions = {"route": ((Code, "theirs"), (Code, "ours"))}
    found = localize_pair(Pair(Trusted(), Routed(), x, functions=functions))
    # What comes after it is given the right value, and is right.
    assert [finding.component for finding in found.findings] == ["route"]


def test_what_matches_nothing_fails_unless_it_is_lacking_on_purpose():
    made = pair(names={"gate_up": ("gate", "up")})
    made.port.extra = nn.Linear(2, 2)
    found = localize_pair(made)
    assert found.verdict == INCONCLUSIVE and "extra.weight" in found.reason and "Pair.names" in found.reason
    lacking = Pair(made.trusted, made.port, made.inputs, names=made.names, lacks=("extra.*",))
    found = localize_pair(lacking)
    assert found.verdict == AGREE and "lacking on purpose: extra.weight, extra.bias" in found.remark


class Ends(torch.nn.Module):
    """Ends in several arrays, one of them of integers."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(HIDDEN)

    def forward(self, x):
        y = self.norm(x)
        return {"hidden": y, "pooled": torch.tanh(y[:, 0]), "best": y.argmax(-1)}


class EndsHere(nn.Module):
    def __init__(self, ends):
        super().__init__()
        self.norm, self.ends = nn.LayerNorm(HIDDEN), ends

    def __call__(self, x):
        return self.ends(self.norm(x))


def whole(y):
    return {"best": mx.argmax(y, -1), "pooled": mx.tanh(y[:, 0]), "hidden": y}


@pytest.mark.parametrize(
    "ends, verdict, words",
    [
        (whole, AGREE, ""),
        (lambda y: whole(y) | {"pooled": y[:, 0]}, DIVERGE, "output.pooled"),
        (lambda y: whole(y) | {"best": mx.argmin(y, -1)}, DIVERGE, "output.best"),
        (lambda y: (y, mx.tanh(y[:, 0]), mx.argmax(y, -1)), AGREE, ""),
        (lambda y: None, INCONCLUSIVE, "no output was compared"),
    ],
)
def test_every_array_that_a_run_ends_in_is_compared(ends, verdict, words):
    x = {"x": np.random.default_rng(0).standard_normal((2, ROWS, HIDDEN)).astype(np.float32)}
    made = Pair(Ends().eval(), EndsHere(ends), x)
    copy_weights(made)
    found = localize_pair(made)
    assert found.verdict == verdict, found
    assert words in (found.first.component if found.first else found.reason)


@pytest.mark.parametrize("channels, width", [(3, 3), (16, 16)])
def test_sides_as_long_as_each_other_do_not_mislead(channels, width):
    class Trusted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(channels, 16, 3, padding=1), torch.nn.GroupNorm(4, 16)

        def forward(self, x):
            return self.norm(self.conv(x))

    class Ported(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(channels, 16, 3, padding=1)
            self.norm = nn.GroupNorm(4, 16, pytorch_compatible=True)

        def __call__(self, x):
            return self.norm(self.conv(x.transpose(0, 2, 3, 1)))

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, channels, width, width, generator=torch.Generator().manual_seed(0)).to(dtype)

        def theirs(model, inputs, call, x=x):
            return model(x)

        def ours(model, inputs, call, x=x):
            return model(mx.array(x.float().numpy()).astype(model.conv.weight.dtype))

        made = Pair(Trusted().eval().to(dtype), Ported(), {}, theirs, ours)
        copy_weights(made)
        found = localize_pair(made)
        assert found.verdict == AGREE, (dtype, found.findings)


def rms(self, x):
    return mx.fast.rms_norm(x, self.weight, self.eps) + self.bias


def unbiased(self, x):
    return mx.fast.layer_norm(x, self.weight, None, self.eps)


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"eps": 1e-3}, "eps is 0.001"),
        ({"__call__": rms}, "the mean is not subtracted"),
        ({"__call__": unbiased}, "the bias is missing"),
    ],
)
def test_layer_norms(changed, says):
    port = Port()
    port.norm = type("Norm", (nn.LayerNorm,), {name: value for name, value in changed.items() if callable(value)})(
        HIDDEN
    )
    port.norm.eps = changed.get("eps", port.norm.eps)
    found = localize_pair(pair(port))
    assert found.verdict == DIVERGE and found.first.component == "norm" and found.first.explanations[0].name == says


def test_a_model_of_another_library_is_refused():
    with pytest.raises(ParityError, match="the port model is a Torch and no module of MLX"):
        Pair(Torch(), Torch(), {})
    with pytest.raises(ParityError, match="the trusted model is a Port and no module of PyTorch"):
        Pair(Port(), Port(), {})


def test_calls_of_other_names_are_told():
    def called(name):
        def run(model, inputs, call):
            call(name)
            return model((torch.from_numpy if isinstance(model, torch.nn.Module) else mx.array)(inputs["ids"]))

        return run

    found = localize_pair(pair(run_trusted=called("a"), run_port=called("b")))
    assert found.verdict == INCONCLUSIVE and "the runs begin other calls (a; the port: b)" in found.reason


def test_nothing_compared_is_no_agreement():
    class Other(nn.Module):
        def __call__(self, ids):
            return None

    made = Pair(torch.nn.Identity(), Other(), {"input": np.zeros((1, 2), np.float32)})
    found = localize_pair(made)
    assert found.verdict == INCONCLUSIVE and "nothing was compared" in found.reason


def test_a_model_that_fails_ends_in_one_line():
    with pytest.raises(ParityError, match="the port of pair cannot run: ValueError"):
        localize_pair(pair(Port(half=3)))


@pytest.mark.parametrize("port, words", [(Port(kernel=5), "shape"), (type("L", (Port,), {})(), None)])
def test_weights_that_cannot_be_copied_are_named(port, words):
    if words is None:
        port.other = nn.Linear(2, 2)
        words = "other.weight of the port has no counterpart"
    with pytest.raises(ParityError, match=words):
        pair(port)


def test_calls_are_told_apart_by_name():
    def twice(model, inputs, call):
        ids = inputs["ids"]
        wrap = torch.from_numpy if isinstance(model, torch.nn.Module) else mx.array
        call("first")
        model(wrap(ids))
        call("second")
        return model(wrap(ids[:, ::-1].copy()))

    found = localize_pair(pair(run_trusted=twice, run_port=twice))
    assert found.verdict == AGREE and {tap.tap.call for tap in found.taps} == {"first", "second"}


@pytest.mark.parametrize(
    "source, words",
    [
        ("", "makes no pair"),
        ("def pair(dtype): return 1", "makes no pair"),
        ("def pair(dtype): raise ValueError('boom')", "boom"),
        ("import sys\ndef pair(dtype): sys.exit(0)", "failed"),
        ("import nonsense_that_is_not_there", "cannot be imported"),
        (None, "there is no Python file"),
    ],
)
def test_bad_files_end_in_one_line(tmp_path, source, words):
    path = tmp_path / "given.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(ParityError, match=words):
        load_pair(path)


def test_a_dtype_that_cannot_be_compared(tmp_path):
    with pytest.raises(ParityError, match="float16"):
        load_pair(tmp_path / "pair.py", "float16")


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ((1, 5, 8), (1, 5, 8)),
        ((1, 5, 8), (5, 8)),
        ((1, 8, 4, 6), (1, 4, 6, 8)),
        ((1, 2, 5, 8), (1, 5, 2, 8)),
        ((1, 2, 2, 8), (1, 4, 1, 8)),
    ],
)
def test_layouts_there_and_back(theirs, ours):
    array = np.arange(np.prod(theirs), dtype=np.float32).reshape(theirs)
    there = put_back(array, np.moveaxis(array, 1, -1) if ours == (1, 4, 6, 8) else array.reshape(ours))
    assert there.shape == ours
    assert np.array_equal(laid_out(there, array), array)


def test_heads_that_are_repeated_stand_for_one():
    keys = np.random.default_rng(0).standard_normal((1, 2, 5, 8)).astype(np.float32)
    assert np.array_equal(laid_out(np.repeat(keys, 3, 1), keys), keys)
    assert laid_out(np.concatenate([keys] * 3, 1), keys) is None


def test_names_beside_each_other():
    block = "run/model.layers.1"
    assert relative(f"{block}.mlp", block) == "mlp"
    assert relative(f"{block}:in", f"{block}.post.norm:in".replace("post.", "")) == "the input of the block"
    assert relative(f"{block}.norm#1", f"{block}.mlp:in") == "another call of norm"
    assert relative("run/a.b:in", "run/a.b.c.d") == "the input of b"
    near, far = (distance(name, f"{block}.mlp:in") for name in (f"{block}.norm", "run/model.embed"))
    assert near < far


@pytest.mark.parametrize("channels", [5, 6])
@pytest.mark.parametrize("first", [False, True])
def test_places_of_a_picture_stand_one_behind_the_other(first, channels):
    picture = np.random.default_rng(0).standard_normal((2, 2, 3, channels)).astype(np.float32)
    places = picture.reshape(2, 6, channels)
    expected = np.ascontiguousarray(places.swapaxes(1, 2) if first else places)
    assert np.array_equal(laid_out(picture, expected), expected)
    assert np.array_equal(put_back(expected, picture), picture)


def test_a_port_that_was_given_no_weights_is_told_so():
    given = pair()
    made = Pair(given.trusted, Port(), given.inputs, names=given.names)
    assert "no weight is the trusted model's" in localize_pair(made).remark
