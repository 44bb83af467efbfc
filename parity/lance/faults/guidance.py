"""Faults of guidance: when it acts, how the arms meet, how the velocity is scaled back."""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np

from lance_mlx.requests.request import Renorm, Request
from lance_mlx.sampling import flow, guidance
from parity.lance.faults.base import BFLOAT16, DRAWS, EDITS, Fault, Need, Patch, wrapped

_UNGUIDED = Need("a step outside the guidance interval", lambda bundle: not all(bundle.guided))


def _guides(change: Callable[[Callable, float, Request], bool]) -> Patch:
    return lambda target: wrapped(flow, "is_guided", change)


def _at_every_step(original: Callable, t: float, request: Request) -> bool:
    return request.guidance_scale > 1.0


def _not_at_the_end(original: Callable, t: float, request: Request) -> bool:
    return original(t, request) and np.float32(t) < np.float32(request.guidance_interval[1])


def _from_data(original: Callable, t: float, request: Request) -> bool:
    return original(1 - t, request)


def _guided(change: Callable[[Callable, mx.array, mx.array, Request], mx.array]) -> Patch:
    return lambda target: wrapped(flow, "guided_velocity", change)


def _renorm(kind: Renorm) -> Patch:
    return _guided(
        lambda original, cond, uncond, request: original(cond, uncond, replace(request, guidance_renorm=kind))
    )


def _from_conditional(original: Callable, cond: mx.array, uncond: mx.array, request: Request) -> mx.array:
    return original(cond, uncond, replace(request, guidance_scale=request.guidance_scale + 1))


def _squared(original: Callable, cond: mx.array, uncond: mx.array, request: Request) -> mx.array:
    guided = original(cond, uncond, replace(request, guidance_renorm=Renorm.NONE))
    ratio = (guidance._norm(cond, None) / (guidance._norm(guided, None) + 1e-8)) ** 2
    return guided * mx.clip(ratio, request.guidance_renorm_min, 1.0)


def _by_the_unconditional(original: Callable, cond: mx.array, uncond: mx.array, request: Request) -> mx.array:
    guided = original(cond, uncond, replace(request, guidance_renorm=Renorm.NONE))
    ratio = guidance._norm(uncond, None) / (guidance._norm(guided, None) + 1e-8)
    return guided * mx.clip(ratio, request.guidance_renorm_min, 1.0)


def _in_float32(original: Callable, cond: mx.array, uncond: mx.array, request: Request) -> mx.array:
    return original(cond.astype(mx.float32), uncond.astype(mx.float32), request)


def _guidance(
    name: str,
    explanation: str,
    patch: Patch,
    about: str,
    tasks: frozenset[str] = DRAWS,
    needs: Need | None = None,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
) -> Fault:
    return Fault(name, about, "guidance", patch, tasks, dtypes, explanation=explanation, needs=needs)


FAULTS = [
    _guidance(
        "guidance-at-every-step",
        "guidance acts at every step",
        _guides(_at_every_step),
        "Guidance acts at every step, whatever the interval.",
        needs=_UNGUIDED,
    ),
    _guidance(
        "guidance-not-at-t-1",
        "the guidance interval leaves out its upper end",
        _guides(_not_at_the_end),
        "Guidance does not act at the upper end of its interval: not in the first step.",
    ),
    _guidance(
        "guidance-interval-from-data",
        "the guidance interval counts from the data",
        _guides(_from_data),
        "The guidance interval is compared with 1 - t.",
    ),
    _guidance(
        "guidance-from-the-conditional",
        "guidance starts from the conditional velocity",
        _guided(_from_conditional),
        "Guidance is cond + scale * (cond - uncond) instead of starting from the unconditional velocity.",
    ),
    _guidance(
        "guidance-arms-exchanged",
        "the guidance arms are exchanged",
        _guided(lambda original, cond, uncond, request: original(uncond, cond, request)),
        "Guidance steers from the conditional towards the unconditional velocity.",
    ),
    _guidance(
        "renorm-channel",
        "the renorm is per token",
        _renorm(Renorm.CHANNEL),
        "Each token's guided velocity is scaled back by itself instead of all of them together.",
    ),
    _guidance("renorm-none", "there is no renorm", _renorm(Renorm.NONE), "The guided velocity is not scaled back."),
    _guidance(
        "renorm-squared",
        "the renorm is the ratio to the power 2",
        _guided(_squared),
        "The guided velocity is scaled back by the ratio of squared lengths.",
    ),
    _guidance(
        "renorm-by-the-unconditional",
        "the renorm aims at the unconditional velocity",
        _guided(_by_the_unconditional),
        "The guided velocity is scaled back to the length of the unconditional one.",
        # The two lengths are all but equal where the source decides most.
        DRAWS - EDITS,
    ),
    _guidance(
        "guidance-in-float32",
        "guidance computes in float32",
        _guided(_in_float32),
        "Guidance is computed in float32 and not rounded.",
        dtypes=BFLOAT16,
    ),
]
