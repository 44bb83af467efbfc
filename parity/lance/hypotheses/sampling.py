"""Hypotheses about the states of the flow sampler, and about the choice of an answer's tokens."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import reference.sampler
from parity.hypotheses.base import DoesNotApply, Hypothesis
from parity.lance.hypotheses.tools import function
from parity.lance.names import logits_name

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe


Advance = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def euler(name: str, advance: Callable[["TapProbe", Advance, Tensor, Tensor, Tensor, Tensor], Tensor]) -> Hypothesis:
    """A hypothesis about the Euler step: `advance` gets the site, upstream's function and its inputs."""
    return Hypothesis(name, ("euler",), function(reference.sampler, "advance", advance))


def step_of(site: "TapProbe") -> int:
    """Number of the step that made the site's state."""
    return site.tap.numbers.get("step", site.request.num_steps) - 1


def in_dtype(dtype: torch.dtype, kept: bool):
    """The step in a dtype, whose result is kept in it or rounded back."""

    def advance(site: "TapProbe", original: Advance, x_t: Tensor, v: Tensor, dt: Tensor, made: Tensor) -> Tensor:
        x_next = original(x_t.to(dtype), v.to(dtype), dt, made)
        return x_next if kept else x_next.to(x_t.dtype)

    return advance


def rounded_interval(site: "TapProbe", original: Advance, x_t: Tensor, v: Tensor, dt: Tensor, made: Tensor) -> Tensor:
    return original(x_t, v, dt.bfloat16().float(), made)


def moves_given(site: "TapProbe", original: Advance, x_t: Tensor, v: Tensor, dt: Tensor, made: Tensor) -> Tensor:
    """Given latents move by their own velocity too."""
    step = step_of(site)
    whole = site.value(f"sampler.velocity{step}")
    if len(made) == len(x_t) or whole is None:
        raise DoesNotApply
    whole = torch.from_numpy(whole).to(v.dtype)
    rows = torch.arange(len(x_t) - len(whole), len(x_t))
    if len(whole) <= len(made):
        raise DoesNotApply
    x_next = original(x_t, v, dt, made)
    given = rows[~torch.isin(rows, made)]
    x_next[given] = x_t[given] - whole[given - rows[0]] * dt
    return x_next


def noise(name: str, change: Callable[["TapProbe", np.ndarray], np.ndarray | None]) -> Hypothesis:
    """A hypothesis about the state before the first step, [latents, 48]."""

    def transform(site: "TapProbe", array: np.ndarray) -> np.ndarray | None:
        return change(site, array) if site.tap.name in ("sampler.x_init", "sampler.noise") else None

    return Hypothesis(name, ("noise",), transform=transform)


def all_noise(site: "TapProbe", array: np.ndarray) -> np.ndarray | None:
    drawn = site.value("sampler.noise")
    return None if drawn is None else drawn


def only_target_noise(site: "TapProbe", array: np.ndarray) -> np.ndarray | None:
    """The denoised block is noise throughout, clean blocks before it stay."""
    drawn, rows = site.value("sampler.noise"), site.layout.target.grid.size
    return None if drawn is None else np.concatenate([array[:-rows], drawn[-rows:]])


def channels_first(site: "TapProbe", array: np.ndarray) -> np.ndarray:
    """Noise drawn channel by channel."""
    return array.reshape(array.shape[::-1]).T.copy()


def given_last(site: "TapProbe", array: np.ndarray) -> np.ndarray | None:
    rows = site.layout.clean_frames * site.layout.target.grid.rows * site.layout.target.grid.columns
    return np.concatenate([array[rows:], array[:rows]]) if rows else None


def chosen(choose: Callable[[np.ndarray, int], int]) -> Callable[["TapProbe", np.ndarray], np.ndarray | None]:
    """Answer tokens chosen from the logits [vocabulary] after the oracle's tokens, and the tokenizer's size."""

    def transform(site: "TapProbe", tokens: np.ndarray) -> np.ndarray | None:
        picked = []
        for step in range(len(tokens)):
            logits = site.value(logits_name(step))
            if logits is None:
                return None
            picked.append(choose(logits[-1], len(site.pipeline.tokenizer)))
        return np.array(picked, np.int32)

    return transform


HYPOTHESES = [
    euler("the Euler state is kept in float32", in_dtype(torch.float32, kept=True)),
    euler("the Euler step rounds once", in_dtype(torch.float32, kept=False)),
    euler("the Euler state is kept in bfloat16", in_dtype(torch.bfloat16, kept=True)),
    euler("the Euler step's length is rounded to bfloat16", rounded_interval),
    euler("the given frame moves", moves_given),
    noise("the given frame is not in place", only_target_noise),
    noise("the first state is noise throughout", all_noise),
    noise("the given frame comes last", given_last),
    noise("noise is drawn channel by channel", channels_first),
    noise("the noise is cast to an unsigned integer", lambda site, array: np.trunc(np.maximum(array, 0))),
    noise("the noise is cast to an unsigned integer, which wraps", lambda site, array: np.float32(
        np.trunc(array).astype(np.int64) % 2**32)),
    Hypothesis("the vocabulary is not masked", ("tokens",), transform=chosen(
        lambda logits, size: int(logits.argmax()))),
    Hypothesis("the second best token is answered", ("tokens",), transform=chosen(
        lambda logits, size: int(np.argsort(-logits[:size], kind="stable")[1]))),
    Hypothesis("the least likely token is answered", ("tokens",), transform=chosen(
        lambda logits, size: int(logits[:size].argmin()))),
]  # fmt: skip
