"""Hypotheses about the language model's rotary embedding; the vision tower's are in vision.py."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from parity.hypotheses.base import Hypothesis, Patch
from parity.lance.hypotheses.tokens import pass_tokens
from parity.lance.hypotheses.tools import around, forward, module_of

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

ROPES = ("layers.*.self_attn.q_rope", "layers.*.self_attn.k_rope")


@dataclass(frozen=True)
class Angles:
    """How the angles of a rotation may be made; the defaults are upstream's.

    alternating: axis of frequency i is i % 3. frequency, angle: what they are rounded to.
    """

    alternating: bool = False
    sections: Callable[[list[int], int], list[int]] = staticmethod(lambda sections, half: sections)
    exponents: Callable[[Tensor, int], Tensor] = staticmethod(lambda exponents, d: exponents)
    frequency: str = "policy"
    angle: str = "float32"


def rotation(site: "TapProbe", position_ids: Tensor, way: Angles) -> tuple[Tensor, Tensor]:
    """cos and sin [n, d] made in a way."""
    model = site.pipeline.model.language_model
    config, d, policy = model.config, model.config.head_dim, model.numerics.torch_dtype
    dtypes = {"policy": policy, "float32": torch.float32, "bfloat16": torch.bfloat16}
    exponents = way.exponents(torch.arange(0, d, 2).float() / d, d)
    frequencies = (1.0 / config.rope_theta**exponents).to(dtypes[way.frequency]).float()
    angles = (position_ids.float()[:, :, None] * frequencies).to(dtypes[way.angle]).float()
    if way.alternating:
        axis = torch.arange(d // 2) % 3
    else:
        sections = way.sections(list(config.mrope_section), d // 2)
        axis = torch.repeat_interleave(torch.arange(len(sections)) % 3, torch.tensor(sections))
    chosen = angles[axis, :, torch.arange(d // 2)].T
    chosen = torch.cat([chosen, chosen], -1)
    return chosen.cos().to(policy), chosen.sin().to(policy)


def made(way: Angles) -> Patch:
    """A patch of the rotation; other layers' are changed too, which the site does not see."""

    def patched(site: "TapProbe") -> AbstractContextManager[object]:
        module_of(site)
        model = site.pipeline.model.language_model
        return around(model, "rotation", lambda original, ids: rotation(site, ids, way))

    return patched


def shifted(change: Callable[[Tensor, Tensor], Tensor]) -> Patch:
    """A patch of the ids [3, n] that the rotation is given; `change` also gets each token's place in its split [n]."""

    def patched(site: "TapProbe") -> AbstractContextManager[object]:
        module_of(site)
        model, tokens = site.pipeline.model.language_model, pass_tokens(site)
        places = torch.from_numpy(tokens.index[len(tokens.index) - tokens.queries :])
        return around(model, "rotation", lambda original, ids: original(
            change(ids, places) if ids.shape[1] == len(places) else ids))  # fmt: skip

    return patched


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 0::2], x[..., 1::2]


def neighbours(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels 2i and 2i + 1 form a pair."""
    first, second = pairs(x)
    half = x.shape[-1] // 2
    c, s = cos[:, None, :half], sin[:, None, :half]
    return torch.stack([first * c - second * s, second * c + first * s], -1).flatten(-2)


def gathered_pairs(
    site: "TapProbe", module: nn.Module, original: Callable, x: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Channels 2i and 2i + 1 form a pair, and are put into the two halves."""
    return original(torch.cat(pairs(x), -1), cos, sin)


def turned_by(change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> Patch:
    return forward(lambda site, module, original, x, cos, sin: original(*change(x, cos, sin)))


def twice(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return original(original(x, cos, sin), cos, sin)


def in_dtype(dtype: torch.dtype) -> Patch:
    def turned(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return original(x.to(dtype), cos.to(dtype), sin.to(dtype))

    return forward(turned)


def doubled(sections: list[int], half: int) -> list[int]:
    """Runs twice as long over the channels of a head, of which only the first half is left."""
    runs, left = [], half
    for size in sections:
        runs.append(min(2 * size, left))
        left -= runs[-1]
    return runs


def restarted(ids: Tensor, places: Tensor) -> Tensor:
    """Ids counted from those of the first token of the split."""
    first = torch.cummax(torch.where(places == 0, torch.arange(len(places)), 0), 0).values
    return ids - ids[:, first]


def half_count(exponents: Tensor, d: int) -> Tensor:
    return exponents * d / (d - 2)


def rounded_ids(ids: Tensor, places: Tensor) -> Tensor:
    return ids.bfloat16()


HYPOTHESES = [
    Hypothesis("RoPE turns neighbouring pairs instead of halves", ROPES, forward(neighbours)),
    Hypothesis("RoPE gathers neighbouring pairs into halves", ROPES, forward(gathered_pairs)),
    Hypothesis("RoPE exchanges cosines and sines", ROPES, turned_by(lambda x, cos, sin: (x, sin, cos))),
    Hypothesis("RoPE is applied twice", ROPES, forward(twice)),
    Hypothesis("RoPE axes alternate frequency by frequency", ROPES, made(Angles(alternating=True))),
    Hypothesis("RoPE sections are twice as long", ROPES, made(Angles(sections=doubled))),
    Hypothesis("RoPE frequencies are not rounded", ROPES, made(Angles(frequency="float32"))),
    Hypothesis("RoPE frequencies are spaced by half - 1", ROPES, made(Angles(exponents=half_count))),
    Hypothesis("RoPE frequencies fall half as fast", ROPES, made(Angles(exponents=lambda e, d: e / 2))),
    Hypothesis("RoPE frequencies fall twice as fast", ROPES, made(Angles(exponents=lambda e, d: e * 2))),
    Hypothesis("RoPE frequencies rise instead of falling", ROPES, made(Angles(exponents=lambda e, d: e.flip(0)))),
    Hypothesis("RoPE angles are rounded to bfloat16", ROPES, made(Angles(angle="bfloat16"))),
    Hypothesis("RoPE turns in bfloat16", ROPES, in_dtype(torch.bfloat16)),
    Hypothesis("RoPE turns in float32", ROPES, in_dtype(torch.float32)),
    Hypothesis("RoPE reads positions rounded to bfloat16", ROPES, shifted(rounded_ids)),
    Hypothesis("RoPE positions start at 0 in every pass", ROPES, shifted(restarted)),
]  # fmt: skip
