"""Caches of keys and values that give back something else than what was put in."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from blind_faults.common import affine, plain, precision, small
from lance_mlx.model.lance import Lance
from lance_mlx.model.mot import ArmInput, KeyValues, LayerInput
from lance_mlx.sampling import flow
from parity.lance.faults.base import DRAWS, Patch, function, method

_SDPA = "layers.*.self_attn.sdpa"


def _past(change: Callable[[KeyValues], KeyValues]) -> Patch:
    """A patch of what a later pass reads of the tokens before it."""

    def read(original: Callable, context: LayerInput, keys: mx.array, values: mx.array) -> KeyValues:
        if context.past is not None:
            context = context._replace(past=change(context.past))
        return original(context, keys, values)

    return method(LayerInput, "followed_by", read)


def _both(change: Callable[[mx.array], mx.array]) -> Patch:
    return _past(lambda past: KeyValues(*(change(x).astype(x.dtype) for x in past)))


def _padded(x: mx.array) -> mx.array:
    return mx.pad(x, ((0, -len(x) % 16), (0, 0), (0, 0)))


def _rotating(x: mx.array) -> mx.array:
    return x if len(x) <= 48 else mx.concatenate([x[:4], x[len(x) - 44 :]])


def _quantized(x: mx.array) -> mx.array:
    # A group of 32 values of a token: both heads.
    return affine(8, 32)(x.reshape(len(x), -1).astype(mx.float32)).reshape(x.shape)


def _layer_before(original: Callable, arm: ArmInput, index: int) -> LayerInput:
    return original(arm, min(index, 1))


def _one_cache(original: Callable, model: Lance, arms: Sequence[flow.Arm], state: flow.State) -> list[mx.array]:
    if len(arms) == 1:
        return original(model, arms, state)
    cond, uncond = arms
    own, uncond._cache = uncond._cache, cond._cache
    try:
        return original(model, arms, state)
    finally:
        uncond._cache = own


FAULTS = [
    plain(
        "blind-cache-padding-attended",
        _SDPA,
        _both(_padded),
        "The cache is kept in blocks of 16 tokens, and the zeros behind its last token are attended to as keys and "
        "values.",
    ),
    plain(
        "blind-cache-rotates-at-48",
        _SDPA,
        _both(_rotating),
        "The cache is a rotating one of 48 tokens, of which it keeps the first 4: of a longer prefix only the first 4 "
        "and the last 44 tokens are seen later.",
    ),
    small(
        "blind-cache-trimmed-by-one",
        _SDPA,
        _both(lambda x: x[:-1]),
        "The last token that was cached is missing when the next split or block reads the cache.",
    ),
    small(
        "blind-cache-layer-two-reads-layer-one",
        "layers.2.self_attn.sdpa",
        method(ArmInput, "at", _layer_before),
        "Layer 2 reads and continues the cache of layer 1 instead of its own.",
    ),
    small(
        "blind-cache-arms-share-one",
        _SDPA,
        function(flow, "velocities", _one_cache),
        "In guided steps the unconditional arm attends to the cached prefix of the conditional arm, user's text "
        "included.",
        tasks=DRAWS,
    ),
    precision(
        "blind-cache-eight-bits",
        _SDPA,
        _both(_quantized),
        "Cached keys and values are quantized to 8 bits in groups of 32 values with scale and bias.",
    ),
]
