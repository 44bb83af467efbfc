"""Classifier-free guidance."""

import mlx.core as mx
import numpy as np

from lance_mlx.backend.numerics import scaled
from lance_mlx.requests.request import Renorm, Request

_STAGE = 64
"""Elements that are added up before their sums are."""


def is_guided(t: float, request: Request) -> bool:
    """Whether guidance acts at time t: its scale is above 1 and lo < t <= hi, compared in float32 as upstream does."""
    low, high = (np.float32(bound) for bound in request.guidance_interval)
    return request.guidance_scale > 1.0 and bool(low < np.float32(t) <= high)


def guided_velocity(cond: mx.array, uncond: mx.array, request: Request) -> mx.array:
    """uncond + scale * (cond - uncond), scaled back towards the length of `cond`; [n, 48] in, same shape and dtype out.

    The factor is clamp(|cond| / (|guided| + 1e-8), min, 1), over the whole tensor or per token
    (bytedance/Lance modeling/lance/lance.py:validation_gen_KVcache).
    """
    guided = uncond + scaled(cond - uncond, request.guidance_scale)
    if request.guidance_renorm is Renorm.NONE:
        return guided
    axis = -1 if request.guidance_renorm is Renorm.CHANNEL else None
    ratio = _norm(cond, axis) / (_norm(guided, axis) + 1e-8)
    return guided * mx.clip(ratio, request.guidance_renorm_min, 1.0)


def _norm(x: mx.array, axis: int | None) -> mx.array:
    wide = x.astype(mx.float32)
    squares = wide * wide
    total = _sum(squares) if axis is None else mx.sum(squares, axis=axis, keepdims=True)
    return mx.sqrt(total).astype(x.dtype)


def _sum(x: mx.array) -> mx.array:
    """The sum of all elements, in stages: the CPU backend adds one after another, which loses the small ones."""
    flat = x.reshape(-1)
    while flat.size > 1:
        flat = mx.pad(flat, (0, -flat.size % _STAGE)).reshape(-1, _STAGE).sum(axis=-1)
    return flat[0]
