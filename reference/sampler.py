"""Rectified flow: the time grid, guidance and the Euler steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from reference.request import Renorm, Request


class Arm(Protocol):
    """One of the two conditionings of a generation, "cond" or "uncond".

    rows: int64, which latents the velocity is about; made: int64, which of them denoising moves.
    """

    name: str
    prefixes: int
    rows: Tensor
    made: Tensor

    def prefill(self, index: int) -> None:
        """Run the arm's prefix split number `index` into its cache."""

    def velocity(self, step: int, x_t: Tensor, timestep: Tensor) -> Tensor:
        """Velocity [rows, 48] of the state x_t [latents, 48] at timestep float32 [latents]."""


@dataclass(frozen=True)
class Step:
    """One denoising step: states [latents, 48], velocities [rows, 48], timestep float32 [latents], t in (0, 1]."""

    index: int
    t: float
    timestep: Tensor
    x_t: Tensor
    velocity_cond: Tensor
    velocity_uncond: Tensor | None
    velocity: Tensor
    x_next: Tensor


def time_grid(num_steps: int, shift: float) -> Tensor:
    """Times from 1 to 0, float32 [num_steps + 1], dense near 1 for shift > 1: t = s u / (1 + (s - 1) u)."""
    u = torch.linspace(1, 0, num_steps + 1)
    return shift * u / (1 + (shift - 1) * u)


def guide(cond: Tensor, uncond: Tensor, request: Request) -> Tensor:
    """Guided velocity, scaled back towards the conditional one's norm (lance.py:validation_gen_KVcache).

    Every operation rounds to the states' dtype, the norms included.
    """
    guided = uncond + request.cfg_text_scale * (cond - uncond)
    if request.cfg_renorm_type is Renorm.NONE:
        return guided
    if request.cfg_renorm_type is Renorm.GLOBAL:
        norms = norm(cond), norm(guided)
    else:
        norms = tuple(norm(v, dim=-1) for v in (cond, guided))
    return guided * (norms[0] / (norms[1] + 1e-8)).clamp(min=request.cfg_renorm_min, max=1.0)


def norm(v: Tensor, dim: int | None = None) -> Tensor:
    """Length of all of a tensor, 0-dim, or along a dimension that stays with size 1; summed wider, rounded to its
    dtype."""
    return torch.norm(v) if dim is None else torch.norm(v, dim=dim, keepdim=True)


def is_guided(t: Tensor, low: float, high: float) -> bool:
    """Whether guidance acts at t, a 0-dim float32 tensor: low < t <= high."""
    return bool(t > low and t <= high)


def advance(x_t: Tensor, velocity: Tensor, interval: Tensor, made: Tensor) -> Tensor:
    """State after an Euler step: the rows `made` of x_t [latents, 48] moved against their velocity [made, 48].

    `interval` is a 0-dim float32 tensor: it does not widen a bfloat16 velocity.
    """
    x_next = x_t.clone()
    x_next[made] = x_t[made] - velocity * interval
    return x_next


def start(noise: Tensor, clean: Tensor | None, made: Tensor) -> Tensor:
    """State before the first step: noise [latents, 48] in the rows that are made, clean latents in the others."""
    if clean is None:
        return noise
    x_init = clean.to(noise.dtype)
    x_init[made] = noise[made]
    return x_init


def denoise(cond: Arm, uncond: Arm | None, x_init: Tensor, request: Request) -> Iterator[Step]:
    """Walk x_init [latents, 48] from t = 1 to t = 0, one yielded Step at a time; prefixes are run first.

    Latents that are not made stay at t = 0. The norms of a guided velocity are taken over all rows that the arms
    answer for.
    """
    for arm in (cond, uncond):
        for index in range(arm.prefixes if arm else 0):
            arm.prefill(index)
    times = time_grid(request.num_steps, request.timestep_shift).to(x_init.device)
    lo, hi = request.cfg_interval
    made, moving = cond.made, torch.isin(cond.rows, cond.made)
    x_t = x_init
    for index in range(request.num_steps):
        t = times[index]
        timestep = torch.zeros(x_init.shape[0], device=x_init.device)
        timestep[made] = t
        velocity = velocity_cond = cond.velocity(index, x_t, timestep)
        velocity_uncond = None
        if uncond is not None and is_guided(t, lo, hi):
            velocity_uncond = uncond.velocity(index, x_t, timestep)
            velocity = guide(velocity_cond, velocity_uncond, request)
        x_next = advance(x_t, velocity[moving], t - times[index + 1], made)
        yield Step(index, float(t), timestep, x_t, velocity_cond, velocity_uncond, velocity, x_next)
        x_t = x_next
