"""Faults of the language model's attention: they show in its output before o_proj."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lance_mlx.model import mot
from lance_mlx.model.layers import Linear
from lance_mlx.model.mot import KeyValues, ScaledDotProductAttention
from parity.lance.faults.base import ALL, DRAWS, EDITS, FLOAT32, LOOKS, Fault, Patch, Target, calls, tf32, wrapped
from parity.lance.faults.passes import Pass, watched

_SDPA = "layers.*.self_attn.sdpa"
_Mask = Callable[[np.ndarray, Pass], np.ndarray]


def _masked(change: _Mask) -> Patch:
    """Change which keys a query sees: bool [n, m], given the pass. Several such faults may act at once."""

    @contextmanager
    def patch(target: Target) -> Iterator[None]:
        with ExitStack() as stack:
            running = stack.enter_context(watched())

            def attend(
                original: Callable,
                module: ScaledDotProductAttention,
                queries: mx.array,
                kv: KeyValues,
                causal: bool | np.ndarray,
            ) -> mx.array:
                seen = _seen(len(queries), len(kv.keys), causal)
                changed = change(seen.copy(), running())
                return original(module, queries, kv, causal if np.array_equal(changed, seen) else changed)

            stack.enter_context(wrapped(ScaledDotProductAttention, "__call__", attend))
            stack.enter_context(wrapped(mot, "attention", _attend_masked))
            yield

    return patch


def _seen(n: int, m: int, causal: bool | np.ndarray) -> np.ndarray:
    """The keys that each of the last n of m positions sees, bool [n, m]; a mask stays as it is."""
    if isinstance(causal, np.ndarray):
        return causal
    return np.tri(n, m, m - n, dtype=bool) if causal else np.ones((n, m), bool)


def _attend_masked(
    original: Callable, queries: mx.array, keys: mx.array, values: mx.array, causal: bool | np.ndarray
) -> mx.array:
    if not isinstance(causal, np.ndarray):
        return original(queries, keys, values, causal)
    return attend(queries, keys, values, causal)


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, causal: bool | np.ndarray, softmax_dtype: mx.Dtype = mx.float32
) -> mx.array:
    """Attention under a mask, with the roundings of lance_mlx's own; shapes as in lance_mlx.model.attention.attention.

    Args:
        causal: as there, or bool [n, m]: the keys that each query sees.
        softmax_dtype: what scores and weights are rounded to after every operation.
    """
    dtype = queries.dtype
    batch, heads, n, head_dim = queries.shape
    kv_heads, m = keys.shape[1:3]
    queries, keys, values = (x.astype(mx.float32) for x in (queries, keys, values))
    queries = queries.reshape(batch, kv_heads, heads // kv_heads, n, head_dim)
    scores = ((queries @ keys[:, :, None].swapaxes(-1, -2)) * head_dim**-0.5).astype(softmax_dtype)
    scores = mx.where(mx.array(_seen(n, m, causal)), scores, -mx.inf)
    weights = mx.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    if softmax_dtype != mx.float32:
        weights, total = weights / total, mx.ones_like(total)
    attended = weights.astype(dtype).astype(mx.float32) @ values[:, :, None]
    return (attended / total).astype(dtype).reshape(batch, heads, n, head_dim)


def _causal_in(kind: Pass) -> _Mask:
    def change(seen: np.ndarray, running: Pass) -> np.ndarray:
        n, m = seen.shape
        return seen & np.tri(n, m, m - n, dtype=bool) if running is kind else seen

    return change


def _text_sees_ahead(seen: np.ndarray, running: Pass) -> np.ndarray:
    return np.ones_like(seen) if running is Pass.TEXT else seen


def _brackets_hidden(seen: np.ndarray, running: Pass) -> np.ndarray:
    if running is Pass.NOISE:
        n, m = seen.shape
        seen[:-1, m - 1] = False
        seen[0, m - n + 1 :] = False
    return seen


def _no_prefix(*passes: Pass) -> _Mask:
    def change(seen: np.ndarray, running: Pass) -> np.ndarray:
        if running in passes:
            n, m = seen.shape
            seen[:, : m - n] = False
        return seen

    return change


def _one_ahead(seen: np.ndarray, running: Pass) -> np.ndarray:
    n, m = seen.shape
    return np.tri(n, m, m - n + 1, dtype=bool) if running is Pass.TEXT else seen


def _at_the_first_key(seen: np.ndarray, running: Pass) -> np.ndarray:
    return np.tri(*seen.shape, dtype=bool) if running is Pass.TEXT else seen


def _attention(compute: Callable) -> Patch:
    return lambda target: wrapped(mot, "attention", compute)


def _tiled(original: Callable, queries: mx.array, keys: mx.array, values: mx.array, causal: bool) -> mx.array:
    heads, kv_heads = queries.shape[1], keys.shape[1]
    order = np.argsort(np.arange(heads) % kv_heads, kind="stable")
    return original(queries[:, mx.array(order)], keys, values, causal)[:, mx.array(np.argsort(order))]


def _scaled(power: float) -> Patch:
    """Multiply the scores by a power of head_dim beside the usual scale."""

    def compute(original: Callable, queries: mx.array, keys: mx.array, values: mx.array, causal: bool) -> mx.array:
        factor = queries.shape[-1] ** power
        return original((queries.astype(mx.float32) * factor).astype(queries.dtype), keys, values, causal)

    return _attention(compute)


def _softmax_in_bfloat16(
    original: Callable, queries: mx.array, keys: mx.array, values: mx.array, causal: bool | np.ndarray
) -> mx.array:
    return attend(queries, keys, values, causal, mx.bfloat16)


def _in_tf32(original: Callable, queries: mx.array, keys: mx.array, values: mx.array, causal: bool) -> mx.array:
    """Both products in TF32, the softmax between them in float32."""
    batch, heads, n, head_dim = queries.shape
    kv_heads, m = keys.shape[1:3]
    queries = tf32(queries * head_dim**-0.5).reshape(batch, kv_heads, -1, n, head_dim)
    scores = queries @ tf32(keys)[:, :, None].swapaxes(-1, -2)
    weights = mx.softmax(mx.where(mx.array(_seen(n, m, causal)), scores, -mx.inf), axis=-1)
    return (tf32(weights) @ tf32(values)[:, :, None]).reshape(batch, heads, n, head_dim)


def _heads_transposed(target: Target) -> AbstractContextManager[None]:
    head_dim = target.config.head_dim

    def project(original: Callable, module: nn.Module, x: mx.array) -> mx.array:
        return original(module, x.reshape(len(x), -1, head_dim).swapaxes(1, 2).flatten(1))

    return calls(Linear, project, "layers.*.self_attn.o_proj*")(target)


def _fault(name: str, explanation: str, patch: Patch, about: str, tasks: frozenset[str] = ALL) -> Fault:
    return Fault(name, about, _SDPA, patch, tasks, explanation=explanation)


FAULTS = [
    _fault(
        "noise-block-causal",
        "no key after the query is seen",
        _masked(_causal_in(Pass.NOISE)),
        "The denoised block attends causally instead of in both directions.",
        DRAWS,
    ),
    _fault(
        "source-block-causal",
        "no key after the query is seen",
        _masked(_causal_in(Pass.CLEAN)),
        "The block of clean latents attends causally instead of in both directions.",
        EDITS,
    ),
    _fault(
        "vit-block-causal",
        "no key after the query is seen",
        _masked(_causal_in(Pass.VIT)),
        "A ViT block attends causally instead of in both directions.",
        LOOKS,
    ),
    _fault(
        "text-sees-ahead",
        "text attends in both directions",
        _masked(_text_sees_ahead),
        "A run of text attends in both directions instead of causally.",
    ),
    _fault(
        "brackets-hidden-from-latents",
        "latents and brackets do not see each other as they should",
        _masked(_brackets_hidden),
        "Latents do not see the closing bracket of their block, and its opening bracket sees none of them.",
        DRAWS,
    ),
    _fault(
        "noise-block-sees-no-prefix",
        "no key before this pass is seen",
        _masked(_no_prefix(Pass.NOISE)),
        "The denoised block sees nothing but itself.",
        DRAWS,
    ),
    _fault(
        "segments-apart",
        "no key before this pass is seen",
        _masked(_no_prefix(*Pass)),
        "Every segment sees nothing but itself.",
    ),
    _fault(
        "causal-mask-one-ahead",
        "the causal mask lets tokens see the next one",
        _masked(_one_ahead),
        "The causal mask is off by one: a token sees the next one too.",
    ),
    _fault(
        "causal-mask-at-the-first-key",
        "the causal mask is aligned to the first key",
        _masked(_at_the_first_key),
        "The causal mask counts queries from the first cached key instead of from the last.",
    ),
    _fault(
        "key-heads-tiled",
        "key heads are tiled instead of repeated for keys and values",
        _attention(_tiled),
        "Query head h meets key head h modulo their number instead of neighbours sharing one.",
    ),
    _fault(
        "attention-scale-by-head-dim",
        "attention scores are divided by head_dim",
        _scaled(-0.5),
        "Attention scores are divided by head_dim instead of by its square root.",
    ),
    _fault(
        "attention-scale-missing",
        "attention scores are not scaled",
        _scaled(0.5),
        "Attention scores are not divided by the square root of head_dim.",
    ),
    Fault(
        "softmax-in-bfloat16",
        "Scores and weights of the attention are bfloat16 after every operation in a float32 model.",
        _SDPA,
        _attention(_softmax_in_bfloat16),
        dtypes=FLOAT32,
        explanation="the softmax computes in bfloat16",
    ),
    Fault(
        "attention-in-tf32",
        "Attention multiplies float32 in TF32, as MLX does on a GPU unless it is told not to.",
        _SDPA,
        _attention(_in_tf32),
        dtypes=FLOAT32,
        explanation="attention computes in TF32",
    ),
    Fault(
        "heads-transposed-before-o-proj",
        "Heads and channels are transposed before the output projection.",
        "layers.*.self_attn.o_proj*",
        _heads_transposed,
        explanation="heads and channels are transposed before o_proj",
    ),
]
