"""The transformer: caching, chunked attention, and who sees whom."""

import warnings

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_mlx import BFLOAT16, FLOAT32, Request, Task
from lance_mlx.backend import cpu_attention, vectorized
from lance_mlx.backend.numerics import runs_on_cpu
from lance_mlx.model import attention as attending
from lance_mlx.model import layers
from lance_mlx.model.attention import attention
from lance_mlx.model.mot import ArmInput, ExpertRows
from lance_mlx.model.rope import inverse_frequencies, rotary_table


def relative(a: mx.array, b: mx.array) -> float:
    return (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item()


def run(model, embeds: mx.array, cuts: list[int]) -> mx.array:
    """Pass text embeddings through the model split at `cuts`, one cached pass a piece."""
    cache, outputs = (), []
    for start, stop in zip([0, *cuts], [*cuts, len(embeds)], strict=True):
        rotary = rotary_table(np.tile(np.arange(start, stop, dtype=np.int32), (3, 1)), model.config, model.numerics)
        hidden, (cache,) = model.language_model.model(
            ExpertRows(embeds[start:stop], None), [ArmInput(rotary, cache)], causal=True, qk_float32=False
        )
        outputs.append(hidden.und)
    return mx.concatenate(outputs)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 40), st.data())
def test_a_text_prefix_is_the_same_however_it_is_cut(pipeline, n, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=4)))
    embeds = mx.random.normal((n, pipeline.model.config.hidden_size), key=mx.random.key(n))
    assert relative(run(pipeline.model, embeds, cuts), run(pipeline.model, embeds, [])) < 5e-6


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 24), st.integers(0, 24), st.booleans(), st.integers(1, 400))
def test_query_chunks_change_nothing(n, past, causal, budget):
    key = mx.random.key(n * 31 + past)
    q = mx.random.normal((1, 4, n, 8), key=key)
    k, v = mx.random.normal((2, 1, 2, n + past, 8), key=key)
    whole, pieces = attention(q, k, v, causal), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attending, "_FEW_SCORES", 0)
        patch.setattr(attending, "runs_on_cpu", lambda: False)
        # CUDA holds the scores of float32.
        patch.setattr(mx.cuda, "is_available", lambda: True)
        patch.setattr(attending, "GPU_SCORE_BUDGET", budget)
        own = attending._mlx_attention
        patch.setattr(attending, "_mlx_attention", lambda q, *rest: pieces.append(q.shape[2]) or own(q, *rest))
        chunked = attention(q, k, v, causal)
    assert relative(chunked, whole) < 1e-6
    assert sum(pieces) == n and max(pieces) == min(n, max(1, budget // (4 * (n + past))))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 24), st.integers(0, 24), st.booleans(), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_tiles_of_scores_change_nothing(n, past, causal, rows, keys, half):
    key = mx.random.key(n * 31 + past)
    dtype = mx.bfloat16 if half else mx.float32
    q = (5 * mx.random.normal((2, 4, n, 8), key=key)).astype(dtype)
    k, v = mx.random.normal((2, 2, 2, n + past, 8), key=key).astype(dtype)
    exact = attending._mlx_attention(*(x.astype(mx.float32) for x in (q, k, v)), causal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "ROWS", rows)
        patch.setattr(cpu_attention, "KEYS", keys)
        patch.setattr(cpu_attention, "SCORES", 1)
        tiled = cpu_attention.attention(q, k, v, causal)
    assert tiled.dtype == dtype and tiled.shape == q.shape
    assert relative(tiled.astype(mx.float32), exact) < (2 * 2**-8 if half else 1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scores", [1, 1 << 22])
def test_attention_has_the_derivative_of_what_mlx_computes(monkeypatch, causal, scores):
    monkeypatch.setattr(cpu_attention, "DERIVED_SCORES", scores)
    q, k, v = mx.random.normal((1, 4, 9, 8)), *mx.random.normal((2, 1, 2, 13, 8))
    weights = mx.random.normal(q.shape)

    def loss(attend):
        return mx.grad(lambda *given: (weights * attend(*given, causal)).sum(), argnums=(0, 1, 2))(q, k, v)

    for own, exact in zip(loss(cpu_attention.attention), loss(attending._mlx_attention), strict=True):
        assert relative(own, exact) < 1e-5


def test_only_what_mlx_fuses_is_left_to_it_whole(monkeypatch):
    def fused(dim, dtype):
        return attending._is_fused(mx.zeros((1, 1, 2, dim), dtype))

    assert not fused(64, mx.bfloat16)
    monkeypatch.setattr(attending, "runs_on_cpu", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    assert fused(64, mx.float32) and fused(128, mx.bfloat16) and not fused(160, mx.bfloat16)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    assert fused(128, mx.bfloat16) and not fused(64, mx.float32)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 24), st.integers(0, 24), st.booleans())
def test_half_precision_attention_is_the_same_attention(n, past, causal):
    key = mx.random.key(n * 31 + past)
    q = mx.random.normal((1, 4, n, 8), key=key).astype(mx.bfloat16)
    k, v = mx.random.normal((2, 1, 2, n + past, 8), key=key).astype(mx.bfloat16)
    exact = attention(*(x.astype(mx.float32) for x in (q, k, v)), causal)
    # Two roundings to 8 bits, of the weights and of the result.
    assert relative(attention(q, k, v, causal).astype(mx.float32), exact) < 2 * 2**-8


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.sampled_from([96, 600, 601, 1024]), st.sampled_from([64, 512, 1500]), st.booleans())
def test_few_rows_are_multiplied_in_blocks_to_the_same_product(rows, width, depth, has_bias):
    weight, bias, x = (mx.random.normal(shape) for shape in ((width, depth), (width,), (rows, depth)))
    whole = x @ weight.T + (bias if has_bias else 0)
    assert relative(layers._product(x, weight, bias if has_bias else None), whole) < 2e-6


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 5), st.integers(1, 70_000), st.sampled_from([1.0, 30.0]))
def test_what_is_computed_on_the_host_is_the_same(rows, columns, scale):
    x = scale * mx.random.normal((rows, columns), key=mx.random.key(columns))
    assert relative(vectorized.silu(x), x * mx.sigmoid(x)) < 1e-6
    scores = np.array(x)
    rounded = scores.copy()
    total = cpu_attention.exponentials(scores, scores.max(axis=-1, keepdims=True), rounded=False)
    assert np.array_equal(total, cpu_attention.exponentials(rounded, rounded.max(axis=-1, keepdims=True), rounded=True))
    assert np.array_equal(rounded, np.array(mx.array(scores).astype(mx.bfloat16).astype(mx.float32)))
    exact = np.exp(np.array(x, np.float64) - np.max(np.array(x), axis=-1, keepdims=True))
    assert np.linalg.norm(scores - exact) < 1e-6 * np.linalg.norm(exact)
    assert np.linalg.norm(total[:, 0] - exact.sum(axis=-1)) < 1e-6 * np.linalg.norm(total)


def test_what_is_not_finite_is_passed_on_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(np.array(vectorized.silu(mx.array([-mx.inf, mx.nan])))).all()
        for value in (mx.inf, -mx.inf, mx.nan):
            q = mx.full((1, 2, 3, 8), value)
            attended = cpu_attention.attention(q, mx.ones((1, 1, 4, 8)), mx.ones((1, 1, 4, 8)), False)
            assert np.isnan(np.array(attended)).all()


def test_every_latent_sees_both_brackets_and_they_see_every_latent(pipeline):
    model = pipeline.model.language_model.model
    hidden = pipeline.model.config.hidden_size
    positions = np.tile(np.arange(8, dtype=np.int32), (3, 1))
    rotary = rotary_table(positions, pipeline.model.config, FLOAT32)
    embeds = mx.random.normal((8, hidden), key=mx.random.key(1))

    def output(embeds: mx.array) -> mx.array:
        rows = ExpertRows(mx.concatenate([embeds[:1], embeds[-1:]]), embeds[1:-1])
        return model(rows, [ArmInput(rotary, ())], causal=False, qk_float32=False)[0].interleave()

    plain = output(embeds)
    for changed in range(8):
        moved = mx.abs(output(embeds + (mx.arange(8) == changed)[:, None]) - plain).sum(axis=1)
        assert (moved > 1e-4).all().item(), f"row {changed} is not seen by {mx.where(moved > 1e-4, 0, 1)}"


def test_experts_compute_their_own_rows_only(pipeline, monkeypatch):
    rows = {}
    for name in ("mlp", "mlp_moe_gen"):
        module = pipeline.model.language_model.model.layers[0][name]
        rows[id(module)] = (name, [])
    original = layers.Linear.__call__
    projections = {
        id(pipeline.model.language_model.model.layers[0][name].gate_proj): name for name in ("mlp", "mlp_moe_gen")
    }
    seen = {"mlp": [], "mlp_moe_gen": []}

    def watch(module, x):
        if id(module) in projections:
            seen[projections[id(module)]].append(len(x))
        return original(module, x)

    monkeypatch.setattr(layers.Linear, "__call__", watch)
    request = Request(Task.T2V, "a bird", 32, 48, 5, num_steps=2, guidance_scale=1.0)
    steps = list(pipeline.denoise(pipeline.prepare(request)))
    assert len(steps) == 2
    # The prefix once, then the two brackets a step; the twelve latents a step and nowhere else.
    assert seen["mlp"][-2:] == [2, 2]
    assert seen["mlp_moe_gen"] == [12, 12]
    assert len(seen["mlp"]) == 3 + 2


def test_bfloat16_rounds_the_rope_frequencies_and_float32_does_not(pipeline):
    exact = inverse_frequencies(pipeline.model.config, FLOAT32)
    rounded = inverse_frequencies(pipeline.model.config, BFLOAT16)
    assert not np.array_equal(exact, rounded)
    assert (rounded.view(np.uint32) & 0xFFFF == 0).all()
    assert np.abs(rounded / exact - 1).max() <= 2**-8


def linears(widths, depth, bias, dtype):
    made = [layers.Linear(depth, width, bias) for width in widths]
    for linear in made:
        linear.set_dtype(dtype)
    mx.eval([linear.parameters() for linear in made])
    return made


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@given(rows=st.integers(1, 6), widths=st.lists(st.integers(1, 40), min_size=1, max_size=3), bias=st.booleans())
@settings(deadline=None, max_examples=25)
def test_joined_linears_give_what_each_gives(dtype, rows, widths, bias):
    made = linears(widths, 24, bias, dtype)
    x = mx.random.normal((rows, 24)).astype(dtype)
    apart = [linear(x) for linear in made]
    mx.eval(apart)
    together = layers.FusedLinear(made)(x)
    assert [y.shape for y in together] == [(rows, width) for width in widths]
    assert all(y.dtype == dtype for y in together)
    limit = 1e-5 if dtype == mx.float32 else 0.02
    assert all(np.allclose(*(np.array(y.astype(mx.float32)) for y in pair), atol=limit)
               for pair in zip(apart, together, strict=True))  # fmt: skip


def test_joined_linears_compute_by_themselves_once_one_has_another_weight():
    made = linears([8, 8], 16, True, mx.float32)
    joined, x = layers.FusedLinear(made), mx.random.normal((1, 16))
    for name in ("weight", "bias"):
        made[1][name] = made[1][name] * 2
        assert np.array_equal(joined(x)[1], made[1](x))
        assert np.array_equal(joined(x)[0], made[0](x))


def test_joined_linears_are_held_once():
    made = linears([256, 256], 1024, False, mx.float32)
    before = mx.get_active_memory()
    joined = layers.FusedLinear(made)
    assert mx.get_active_memory() <= before + 65536
    assert joined(mx.ones((1, 1024)))[0].shape == (1, 256)


def test_more_rows_leave_joined_linears_apart(monkeypatch):
    joined = layers.FusedLinear(linears([8, 8], 16, False, mx.float32))
    called = []
    monkeypatch.setattr(layers.Linear, "__call__", lambda self, x: called.append(len(x)) or x)
    joined(mx.ones((1, 16)))
    joined(mx.ones((2, 16)))
    assert called == [2, 2]


@pytest.mark.skipif(not runs_on_cpu(), reason="a GPU rounds a joined product as its parts")
def test_half_precision_is_joined_only_where_that_rounds_as_before(monkeypatch):
    monkeypatch.setattr(layers, "_LARGE", 8 * 16)
    for widths, apart in (([8, 4], 2), ([4, 2], 0), ([8, 8], 0)):
        joined, called = layers.FusedLinear(linears(widths, 16, True, mx.bfloat16)), []
        with monkeypatch.context() as patch:
            patch.setattr(layers.Linear, "__call__", lambda self, x, called=called: called.append(1) or x)
            joined(mx.ones((1, 16)))
        assert len(called) == apart, widths


def test_linears_take_no_rows_and_more_dimensions():
    for dtype in (mx.float32, mx.bfloat16):
        (linear,) = linears([8], 16, True, dtype)
        assert linear(mx.zeros((0, 16))).shape == (0, 8)
        x = mx.random.normal((1, 3, 16)).astype(dtype)
        assert np.array_equal(linear(x)[0].astype(mx.float32), linear(x[0]).astype(mx.float32))
