"""Small parts and what a port of each may do instead: every one found, and named."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

from parity import ParityError, localize_pair
from parity.comparison.verdict import AGREE, DIVERGE
from parity.pairs import Pair, copy_weights

BATCH, TOKENS, HEADS, SIZE = 2, 9, 4, 8
WIDTH = HEADS * SIZE
SLOPES = [0.5, 0.25, 0.125, 0.0625]


class WrittenOut(torch.nn.Module):
    """Causal attention with ALiBi, one operation after the other."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / SIZE**0.5
        apart = torch.arange(n) - torch.arange(n)[:, None]
        scores = scores + torch.tensor(SLOPES)[:, None, None] * apart
        weights = torch.softmax(scores.masked_fill(apart > 0, torch.finfo(scores.dtype).min), -1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, WIDTH))


class Attention(nn.Module):
    """Its port, by MLX's function or written out too."""

    def __init__(self, fault="", written_out=False):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self._fault, self._written_out = fault, written_out

    def __call__(self, x):
        b, n, _ = x.shape
        fault = self._fault
        split = (HEADS, 3, SIZE) if fault == "split" else (3, HEADS, SIZE)
        made = self.qkv(x).reshape(b, n, *split)
        q, k, v = (made[..., i, :] if fault == "split" else made[:, :, i] for i in range(3))
        q, k, v = (each.swapaxes(1, 2) for each in (q, k, v))
        apart = mx.arange(n) - mx.arange(n)[:, None]
        by = mx.array(SLOPES)
        by = {"none": 0 * by, "reversed": by[::-1], "twice": 2 * by}.get(fault, by)
        added = by[:, None, None] * apart
        added = mx.where(apart > 0, -1e9, added) if fault != "all seen" else added
        scale = {"scale": 1.0}.get(fault, SIZE**-0.5)
        if self._written_out:
            weights = mx.softmax(q @ k.swapaxes(-1, -2) * scale + added, axis=-1)
            out = weights @ v
        else:
            out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=added.astype(q.dtype))
        out = out if fault == "heads" else out.swapaxes(1, 2)
        return self.out(out.reshape(b, n, WIDTH))


def found(trusted, port, x, **options):
    pair = Pair(trusted.eval(), port, {"x": x}, run_trusted=lambda model, inputs, call: model(
        torch.from_numpy(inputs["x"])), **options)  # fmt: skip
    copy_weights(pair)
    return localize_pair(pair)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("", None),
        ("none", "nothing is added to the scores"),
        ("reversed", "what is added to the scores of the heads is in reverse order"),
        ("twice", "what is added to the scores is 2 times as large"),
        ("scale", "scores are 2.828 times as large"),
        ("heads", "heads are not put behind tokens before their channels are joined"),
    ],
)
def test_attention_that_is_written_out(fault, cause, written_out):
    torch.manual_seed(0)
    result = found(WrittenOut(), Attention(fault, written_out), noise(BATCH, TOKENS, WIDTH))
    assert result.verdict == (DIVERGE if fault else AGREE), result.reason
    assert [finding.explanations[0].name for finding in result.findings] == ([cause] if fault else [])


def test_a_fused_projection_split_another_way():
    torch.manual_seed(0)
    result = found(WrittenOut(), Attention("split"), noise(BATCH, TOKENS, WIDTH))
    causes = [finding.explanations[0].name for finding in result.findings]
    assert causes[0] == "qkv, its q as those of each head one behind the other is in its place"


class Embedded(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places, self.kinds = (torch.nn.Embedding(count, WIDTH) for count in (32, 16, 2))
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.pool = torch.nn.Linear(WIDTH, WIDTH)
        self.tail = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1])[None]) + self.kinds(torch.zeros_like(ids))
        return self.tail(torch.tanh(self.pool(self.norm(x)[:, 0])))


class Embeds(nn.Module):
    def __init__(self, fault=""):
        super().__init__()
        self.words, self.places, self.kinds = (nn.Embedding(count, WIDTH) for count in (32, 16, 2))
        self.norm = nn.LayerNorm(WIDTH)
        self.pool, self.tail = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self._fault = fault

    def __call__(self, ids):
        fault = self._fault
        places = self.places(mx.arange(ids.shape[1])[None] + (1 if fault == "one too far" else 0))
        words = self.words(ids) * (WIDTH**0.5 if fault == "scaled" else 1)
        x = words + self.kinds(mx.zeros_like(ids)) + (0 if fault == "no places" else places)
        x = self.norm(x)
        x = {"last": x[:, -1], "mean": x.mean(1)}.get(fault, x[:, 0])
        if fault == "dropout":
            x = nn.Dropout(0.2)(x)
        return self.tail(mx.tanh(self.pool(x)))


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("one too far", "the rows of the table that are taken are off by +1"),
        ("no places", "places is not added"),
        ("scaled", "words is added 5.657 times"),
        ("last", "norm, the last token is in its place"),
        ("mean", "norm, the mean of tokens is in its place"),
        ("dropout", "it computes something else each time, as with dropout or noise that is not seeded"),
    ],
)
def test_tables_sums_and_tokens(fault, cause):
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(0, 32, (BATCH, TOKENS))
    result = found(Embedded(), Embeds(fault), ids)
    assert result.verdict == DIVERGE
    assert [finding.explanations[0].name for finding in result.findings] == [cause]


def test_a_weight_that_is_another_parts():
    torch.manual_seed(0)
    trusted, port = Embedded().eval(), Embeds()
    pair = Pair(trusted, port, {"ids": np.zeros((1, 3), np.int64)}, run_trusted=lambda model, inputs, call: model(
        torch.from_numpy(inputs["ids"])))  # fmt: skip
    copy_weights(pair)
    port.pool.weight = port.tail.weight
    (finding,) = localize_pair(pair).findings
    assert (finding.tap, finding.explanations[0].name) == ("weights/pool.weight", "tail.weight is in its place")


class Down(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.GroupNorm(8, WIDTH, eps=1e-6)
        self.conv = torch.nn.Conv2d(WIDTH, WIDTH, 3, stride=2)

    def forward(self, x):
        return self.conv(torch.nn.functional.pad(self.norm(x), (0, 1, 0, 1)))


class Downs(nn.Module):
    def __init__(self, fault=""):
        super().__init__()
        self.norm = nn.GroupNorm(4 if fault == "groups" else 8, WIDTH, 1e-5 if fault == "eps" else 1e-6,
                                 pytorch_compatible=fault != "apart")  # fmt: skip
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, stride=2)
        self._fault = fault

    def __call__(self, x):
        around = [(1, 0), (1, 0)] if self._fault == "side" else [(0, 1), (0, 1)]
        mode = "edge" if self._fault == "edge" else "constant"
        return self.conv(mx.pad(self.norm(x.transpose(0, 2, 3, 1)), [(0, 0), *around, (0, 0)], mode)).transpose(
            0, 3, 1, 2
        )


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("", None),
        ("groups", "there are 4 groups"),
        ("apart", "a group's channels lie apart"),
        ("eps", "eps is 1e-5"),
        ("side", "the border is on the other side"),
        ("edge", "the border holds the nearest values"),
    ],
)
def test_group_norms_and_borders(fault, cause):
    torch.manual_seed(0)
    trusted = Down()
    torch.nn.init.normal_(trusted.norm.weight)
    result = found(
        trusted, Downs(fault), 0.02 * noise(BATCH, WIDTH, 6, 8) if fault == "eps" else noise(BATCH, WIDTH, 6, 8)
    )
    assert [finding.explanations[0].name for finding in result.findings] == ([cause] if fault else [])


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda weight: weight.swapaxes(1, 2), "the weight's rows and columns are exchanged"),
        (lambda weight: weight[:, ::-1, ::-1], "the weight's rows and columns are reversed"),
    ],
)
def test_kernels_laid_out_another_way(change, cause):
    torch.manual_seed(0)
    trusted, port = Down().eval(), Downs()
    pair = Pair(trusted, port, {"input": noise(BATCH, WIDTH, 6, 8)}, run_trusted=lambda model, inputs, call: model(
        torch.from_numpy(inputs["input"])))  # fmt: skip
    copy_weights(pair)
    port.conv.weight = change(port.conv.weight)
    (finding,) = localize_pair(pair).findings
    assert finding.explanations[0].name == cause


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda model: model.pool.weight.data.fill_(torch.nan), "computes NaN or infinity, first in run/pool"),
        (lambda model: model.register_module("norm", torch.nn.Sequential(model.norm, torch.nn.Dropout())),
         "computes something else each time, first in run/norm"),
    ],
)  # fmt: skip
def test_a_trusted_model_that_is_none(spoil, told):
    trusted, port = Embedded(), Embeds()
    spoil(trusted)
    pair = Pair(trusted, port, {"ids": np.zeros((1, 3), np.int64)}, run_trusted=lambda model, inputs, call: model(
        torch.from_numpy(inputs["ids"])))  # fmt: skip
    with pytest.raises(ParityError, match=told):
        localize_pair(pair)


def test_float16_is_compared_as_what_it_rounds_to():
    torch.manual_seed(0)
    trusted, port = Embedded().eval().half(), Embeds()
    pair = Pair(trusted, port, {"ids": np.arange(6)[None]}, run_trusted=lambda model, inputs, call: model(
        torch.from_numpy(inputs["ids"])))  # fmt: skip
    copy_weights(pair)
    assert localize_pair(pair).verdict == AGREE


class Fused(torch.nn.Module):
    """Attention by PyTorch's function, its queries scaled before it."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        q, k, v = (part(x).reshape(*x.shape[:2], HEADS, SIZE).transpose(1, 2) for part in (self.q, self.k, self.v))
        q = q * SIZE**-0.5
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2)


class ScalesScores(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self._scale = scale

    def __call__(self, x):
        q, k, v = (part(x).reshape(*x.shape[:2], HEADS, SIZE).swapaxes(1, 2) for part in (self.q, self.k, self.v))
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self._scale)
        return out.swapaxes(1, 2).reshape(x.shape)


@pytest.mark.parametrize(("scale", "verdict"), [(SIZE**-0.5, AGREE), (1.0, DIVERGE), (SIZE**-1, DIVERGE)])
def test_queries_may_be_scaled_before_or_in_attention(scale, verdict):
    torch.manual_seed(0)
    assert found(Fused(), ScalesScores(scale), noise(BATCH, TOKENS, WIDTH)).verdict == verdict


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class TwoOf(nn.Module):
    def __init__(self, act=mx.tanh, compiled=False, last=False):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self._act, self._last = act, last
        self._run = mx.compile(self._computed) if compiled else self._computed

    def _computed(self, x):
        return self.b(self._act(self.a(x)))

    def __call__(self, x):
        made = self._run(x)
        return made.swapaxes(1, 2) if self._last else made


def test_a_compiled_port_is_looked_into():
    torch.manual_seed(0)
    x = noise(BATCH, TOKENS, WIDTH)
    assert found(Two(), TwoOf(compiled=True), x).verdict == AGREE
    result = found(Two(), TwoOf(mx.sigmoid, compiled=True), x)
    assert result.first.explanations[0].name == "x passes sigmoid instead of tanh"


def test_an_output_that_is_laid_out_another_way_is_told():
    torch.manual_seed(0)
    result = found(Two(), TwoOf(last=True), noise(BATCH, TOKENS, WIDTH))
    assert (result.verdict, "stand elsewhere than the trusted model's: run/output" in result.remark) == (AGREE, True)


class Pooled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.b(self.a(x).mean(1))


class Pools(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def __call__(self, x):
        return self.b(self.a(x).mean(1))


@pytest.mark.parametrize("seed", range(6))
def test_means_of_bfloat16_may_be_rounded_twice(seed):
    torch.manual_seed(seed)
    pair = Pair(Pooled().eval().bfloat16(), Pools(), {"x": noise(1, 6, WIDTH, seed=seed)})
    copy_weights(pair)
    assert localize_pair(pair).verdict == AGREE


def mean_term_by_term(x):
    total = x[:, 0]
    for place in range(1, x.shape[1]):
        total = total + x[:, place]
    return total / x.shape[1]


def test_means_of_bfloat16_may_be_rounded_after_each_term():
    torch.manual_seed(0)
    pair = Pair(Pooled().eval().bfloat16(), TwoOf(mean_term_by_term), {"x": noise(2, 60, WIDTH)})
    copy_weights(pair)
    assert localize_pair(pair).verdict == AGREE


class Passed(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH), function

    def forward(self, x):
        return self.b(self.function(self.a(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (torch.nn.functional.elu, nn.elu),
        (torch.nn.functional.softplus, nn.softplus),
        (torch.nn.functional.mish, nn.mish),
    ],
)
def test_exponentials_that_something_cancels_round_in_their_own_way(theirs, ours, dtype):
    torch.manual_seed(0)
    pair = Pair(Passed(theirs).eval().to(dtype), TwoOf(ours), {"x": noise(BATCH, TOKENS, WIDTH)})
    copy_weights(pair)
    assert localize_pair(pair).verdict == AGREE


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (lambda x: x.var(1, unbiased=False), lambda x: x.var(1)),
        (lambda x: x.cumsum(1), lambda x: x.cumsum(1)),
    ],
)
def test_variances_and_running_sums_round_term_by_term(theirs, ours):
    torch.manual_seed(0)
    assert found(Passed(theirs), TwoOf(ours), noise(BATCH, TOKENS, WIDTH)).verdict == AGREE


def layer_norm(x):
    off = x - x.mean(-1, keepdims=True)
    return off * mx.rsqrt((off * off).mean(-1, keepdims=True) + 1e-5)


def softmax(x):
    return torch.softmax(x, -1, dtype=torch.float32).to(x.dtype)


@pytest.mark.parametrize("tokens", [9, 60])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (softmax, lambda x: mx.softmax(x, -1, precise=False)),
        (lambda x: x.cumsum(1), lambda x: x.cumsum(1)),
        (lambda x: x - x.var(1, keepdim=True, unbiased=False), lambda x: x - x.var(1, keepdims=True)),
        (torch.nn.LayerNorm(WIDTH, elementwise_affine=False), layer_norm),
    ],
)
def test_what_is_computed_in_bfloat16_throughout_is_as_right(theirs, ours, tokens):
    torch.manual_seed(0)
    pair = Pair(Passed(theirs).eval().bfloat16(), TwoOf(ours), {"x": noise(BATCH, tokens, WIDTH)})
    copy_weights(pair)
    assert localize_pair(pair).verdict == AGREE


class Attends(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(*(x[:, None],) * 3)[:, 0]


def attends(x):
    return mx.softmax(x @ x.swapaxes(-1, -2) * WIDTH**-0.5, axis=-1, precise=False) @ x


def test_a_long_sum_of_bfloat16_is_told_as_its_rounding():
    torch.manual_seed(0)
    pair = Pair(Passed(Attends()).eval().bfloat16(), TwoOf(attends), {"x": noise(1, 400, WIDTH)})
    copy_weights(pair)
    first = localize_pair(pair).first
    assert first.component == "b (input)" and first.certain
    assert first.explanations[0].name == "the softmax is computed in bfloat16"
