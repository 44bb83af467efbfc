"""Attention of the transformer that weighs, sees or lays out its heads otherwise."""

import math
from collections.abc import Callable

import mlx.core as mx

from blind_faults.common import int8, outputs, pair, plain, precision, small
from lance_mlx.model.mot import KeyValues, ScaledDotProductAttention
from parity.lance.faults.base import Patch, calls

_SDPA = "layers.*.self_attn.sdpa"
Scores = Callable[[mx.array], mx.array]


def _softmax(scores: mx.array) -> mx.array:
    return mx.softmax(scores, axis=-1)


def _attend(
    queries: mx.array,
    kv: KeyValues,
    causal: bool,
    scored: Scores = lambda scores: scores,
    weighed: Scores = _softmax,
    group: Callable[[int, int], int] = lambda head, size: head // size,
    hidden: Callable[[int, int], mx.array] | None = None,
) -> mx.array:
    """Attention in float32 with a part done otherwise: scores float32 [heads, n, m] before the mask, weights after it,
    the keys' head of each query head, and what is hidden besides, bool [n, m]."""
    n, heads, width = queries.shape
    m, groups = kv.keys.shape[:2]
    chosen = mx.array([group(head, heads // groups) for head in range(heads)])
    q = queries.astype(mx.float32).transpose(1, 0, 2) * width**-0.5
    k, v = (x.astype(mx.float32).transpose(1, 0, 2)[chosen] for x in kv)
    scores = scored(q @ k.swapaxes(1, 2))
    if causal:
        scores = mx.where(mx.arange(m) > mx.arange(m - n, m)[:, None], -mx.inf, scores)
    if hidden is not None:
        scores = mx.where(hidden(n, m), -mx.inf, scores)
    return (weighed(scores) @ v).transpose(1, 0, 2).astype(queries.dtype)


def _instead(*patterns: str, **parts: Callable) -> Patch:
    def call(original: Callable, module: object, queries: mx.array, kv: KeyValues, causal: bool) -> mx.array:
        return _attend(queries, kv, causal, **parts)

    return calls(ScaledDotProductAttention, call, *(patterns or (_SDPA,)))


def _with_sink(scores: mx.array) -> mx.array:
    top = mx.maximum(scores.max(axis=-1, keepdims=True), 0)
    weights = mx.exp(scores - top)
    return weights / (weights.sum(axis=-1, keepdims=True) + mx.exp(-top))


def _bfloat16_softmax(scores: mx.array) -> mx.array:
    return mx.softmax(scores.astype(mx.bfloat16), axis=-1).astype(mx.float32)


def _log_length(original: Callable, module: object, q: mx.array, kv: KeyValues, causal: bool) -> mx.array:
    factor = math.log(max(len(kv.keys), 2)) / math.log(512)
    return original(module, (q.astype(mx.float32) * factor).astype(q.dtype), kv, causal)


def _first_unseen(n: int, m: int) -> mx.array:
    # The first token itself has nothing else to see.
    return (mx.arange(m) == 0) & (mx.arange(m - n, m) > 0)[:, None]


def _windowed(n: int, m: int) -> mx.array:
    return mx.arange(m) <= mx.arange(m - n, m)[:, None] - 48


def _top_left(original: Callable, module: object, q: mx.array, kv: KeyValues, causal: bool) -> mx.array:
    n, m = len(q), len(kv.keys)
    if not causal or n == 1 or n == m:
        return original(module, q, kv, causal)
    return _attend(q, kv, False, hidden=lambda n, m: mx.arange(m) > mx.arange(n)[:, None])


def _tail_lost(original: Callable, module: object, q: mx.array, kv: KeyValues, causal: bool) -> mx.array:
    y, whole = original(module, q, kv, causal), len(q) // 8 * 8
    return mx.concatenate([y[:whole], mx.zeros_like(y[whole:])]) if whole else y


def _not_transposed(y: mx.array) -> mx.array:
    return y.transpose(1, 0, 2).reshape(y.shape)


def _quantized(original: Callable, module: object, q: mx.array, kv: KeyValues, causal: bool) -> mx.array:
    q8, k8 = (int8(x.astype(mx.float32), axis=-1).astype(x.dtype) for x in (q, kv.keys))
    return original(module, q8, KeyValues(k8, kv.values), causal)


def _capped(scores: mx.array) -> mx.array:
    return 15 * mx.tanh(scores / 15)


def _later_group(head: int, size: int) -> int:
    return min((head + 1) // size, 1)


FAULTS = [
    plain(
        "blind-attention-softcap",
        _SDPA,
        _instead(scored=_capped),
        "Attention scores are capped by 15 * tanh(score / 15) before the softmax.",
    ),
    plain(
        "blind-attention-off-by-one-softmax",
        _SDPA,
        _instead(weighed=_with_sink),
        "The softmax of attention has 1 added to its denominator, exp(s) / (1 + sum(exp(s))), as if there were a key "
        "of score 0 without a value.",
    ),
    plain(
        "blind-attention-log-length",
        _SDPA,
        calls(ScaledDotProductAttention, _log_length, _SDPA),
        "Queries are multiplied by ln(number of keys) / ln(512), the length scaling of Qwen 1.",
    ),
    plain(
        "blind-attention-window-of-48",
        _SDPA,
        _instead(hidden=_windowed),
        "The sliding window of 48 tokens that the config names but switches off is applied: keys 48 or more before a "
        "query are not seen.",
    ),
    plain(
        "blind-attention-heads-not-transposed-back",
        _SDPA,
        outputs(ScaledDotProductAttention, _not_transposed, _SDPA),
        "The output of attention, [heads, tokens, head_dim], is reshaped to tokens without being transposed first.",
    ),
    plain(
        "blind-attention-cached-mask-top-left",
        _SDPA,
        calls(ScaledDotProductAttention, _top_left, _SDPA),
        "The causal mask of a text split behind a cached prefix is counted from the first key instead of from the "
        "last: query i sees keys 0 to i alone.",
    ),
    small(
        "blind-attention-head-one-in-the-next-group",
        _SDPA,
        _instead(group=_later_group),
        "Query head 1 of four reads the second head of keys and values, as if groups began one head earlier: the "
        "groups are {0} and {1, 2, 3} instead of {0, 1} and {2, 3}.",
    ),
    small(
        "blind-attention-first-key-masked",
        _SDPA,
        _instead(hidden=_first_unseen),
        "No token but itself sees the first token of the sequence: the padding mask begins one too late.",
    ),
    small(
        "blind-attention-tail-of-eight-lost",
        _SDPA,
        calls(ScaledDotProductAttention, _tail_lost, _SDPA),
        "The kernel takes queries by eights: the rows that remain of a pass of more than eight get zeros.",
    ),
    small(
        "blind-attention-layer-two-sharper",
        "layers.2.self_attn.sdpa",
        _instead("layers.2.self_attn.sdpa", scored=lambda scores: scores * 1.02),
        "In layer 2 alone the scores of attention are multiplied by 1.02.",
    ),
    precision(
        "blind-attention-softmax-bfloat16",
        _SDPA,
        _instead(weighed=_bfloat16_softmax),
        "Scores are rounded to bfloat16 before the softmax, and its weights after it.",
    ),
    precision(
        "blind-attention-int8-scores",
        _SDPA,
        calls(ScaledDotProductAttention, _quantized, _SDPA),
        "Queries and keys are quantized to int8 with one scale a token and head before their product, as SageAttention "
        "does.",
    ),
    pair(
        "blind-pair-attention-capped-and-regrouped",
        _SDPA,
        _instead(scored=_capped, group=_later_group),
        "Two faults of attention at once: scores are capped by 15 * tanh(score / 15), and query head 1 reads the "
        "second head of keys and values.",
    ),
]
