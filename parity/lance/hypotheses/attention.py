"""Hypotheses about attention itself: scores, softmax, heads, and what the cache holds."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import reference.mot
import reference.vae_layers
import reference.vit
from parity.hypotheses.base import DoesNotApply, Hypothesis, Patch
from parity.lance.hypotheses import masks
from parity.lance.hypotheses.dtypes import float32_policy, tf32
from parity.lance.hypotheses.tokens import by_expert, cached_count, in_pass, pass_tokens
from parity.lance.hypotheses.tools import forward, function, in_own_pass

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

SDPA = ("layers.*.self_attn.sdpa",)
ANY = (*SDPA, "vit_model.blocks.*.attn.proj", "vae.*.proj")
OUTPUT = ("layers.*.self_attn.o_proj*", "vit_model.blocks.*.attn.proj")
# Whose `attend` a component calls.
CALLERS = (("layers.", reference.mot), ("vit_model", reference.vit), ("vae.", reference.vae_layers))


def attend_by(wrapper: Callable[..., Tensor]) -> Patch:
    """A patch of the attention function: `wrapper(site, original, q, k, v, mask, kind)`."""

    def patched(site: "TapProbe"):
        for prefix, caller in CALLERS:
            if site.component.startswith(prefix):
                return function(caller, "attend", wrapper)(site)
        raise DoesNotApply

    return patched


def repeated(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype, axis: int = -1):
    """Attention with every operation in a dtype; shapes as reference.numerics.attend's."""
    k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    q, k, v = (x.transpose(0, 1).to(dtype) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(dtype).min)
    weights = (scores - scores.amax(axis, keepdim=True)).exp()
    weights = weights / weights.sum(axis, keepdim=True)
    return (weights @ v).transpose(0, 1)


def scaled(power: float) -> Patch:
    """Scores times head_dim ** power instead of head_dim ** -0.5."""

    return attend_by(lambda site, original, q, *rest: wide(original, q, q.shape[-1] ** (power + 0.5), *rest))


def wide(original: Callable, q: Tensor, factor: float, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """Attention of queries times a factor, which is not rounded in between."""
    return original(q.float() * factor, k.float(), v.float(), *rest).to(q.dtype)


def scaled_by_width(site: "TapProbe", original: Callable, q: Tensor, *rest: Any) -> Tensor:
    if q.shape[1] == 1:
        raise DoesNotApply
    return wide(original, q, q.shape[1] ** -0.5, *rest)


def exchanged(*order: int) -> Patch:
    """Queries, keys and values in another order."""

    def attended(site: "TapProbe", original: Callable, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        inputs = (q, k, v)
        if order[0] != 0 and k.shape != q.shape:
            raise DoesNotApply
        return original(*(inputs[i] for i in order), *rest)

    return attend_by(attended)


def in_dtype(dtype: torch.dtype, axis: int = -1) -> Patch:
    def attended(
        site: "TapProbe", original: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *rest: Any
    ) -> Tensor:
        return explicit(q, k, v, mask, q.shape[-1] ** -0.5, dtype, axis).to(q.dtype)

    return attend_by(attended)


def softmax_in_bfloat16(
    site: "TapProbe", original: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *rest: Any
):
    k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    q_, k_, v_ = (x.transpose(0, 1).float() for x in (q, k, v))
    scores = q_ @ k_.transpose(1, 2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    scores = scores.bfloat16()
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = (weights / weights.sum(-1, keepdim=True)).float()
    return (weights @ v_).transpose(0, 1).to(q.dtype)


def in_tf32(site: "TapProbe", original: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *rest: Any) -> Tensor:
    """Both products in TF32, the softmax between them in float32."""
    float32_policy(site)
    k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    q_, k_, v_ = (tf32(x.transpose(0, 1)) for x in (q * q.shape[-1] ** -0.5, k, v))
    scores = q_ @ k_.transpose(1, 2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (tf32(torch.softmax(scores, -1)) @ v_).transpose(0, 1)


def masked_to_zero(site: "TapProbe", original: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *rest: Any):
    """Hidden scores count as 0 instead of minus infinity."""
    if mask is None:
        raise DoesNotApply
    k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    q_, k_, v_ = (x.transpose(0, 1).float() for x in (q, k, v))
    scores = (q_ @ k_.transpose(1, 2) * q.shape[-1] ** -0.5) * mask
    return (torch.softmax(scores, -1) @ v_).transpose(0, 1).to(q.dtype)


def heads_apart(site: "TapProbe", original: Callable, *inputs: Any) -> Tensor:
    """The result [heads, n, d] is read as [n, heads, d] without being transposed."""
    out = original(*inputs)
    return out.transpose(0, 1).reshape(out.shape)


def with_cache(change: Callable[["TapProbe", Tensor, Tensor], tuple[Tensor, Tensor]]) -> Patch:
    """Other cached keys and values: `change` is given those of the cache."""

    def attended(site: "TapProbe", module: object, original: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor):
        tokens, count = pass_tokens(site), cached_count(site)
        if (tokens.queries, len(tokens.split)) != (len(q), len(k)):
            return original(q, k, v, mask)  # a pass before the site's
        old_k, old_v = change(site, k[:count], v[:count])
        if mask is not None:
            # What a call computes sees all that comes before it.
            mask = F.pad(mask[:, count:], (len(old_k), 0), value=True)
        return original(q, torch.cat([old_k, k[count:]]), torch.cat([old_v, v[count:]]), mask)

    return forward(attended)


def earlier_steps(site: "TapProbe", k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The cache also holds the blocks of the denoising steps before."""
    step, arm = site.tap.numbers.get("step", 0), site.tap.arm
    if ".step" not in site.tap.call:
        raise DoesNotApply
    return followed(site, k, v, [f"{arm}.step{before}" for before in range(step)])


def followed(site: "TapProbe", k: Tensor, v: Tensor, calls: list[str]) -> tuple[Tensor, Tensor]:
    """Keys and values followed by those of other calls of the same layer."""
    if not calls:
        raise DoesNotApply
    root = site.path.rpartition(".")[0]
    keys, values = [k], [v]
    for call in calls:
        old_k = site.value(f"{call}/{root}.k_rope")
        if old_k is None:
            raise DoesNotApply
        # A block of latents has its two brackets, which the understanding expert computes, at its ends.
        gen = np.zeros(len(old_k), bool)
        gen[1:-1] = site.value(f"{call}/{root}.v_proj_moe_gen") is not None
        old_v = by_expert(site, call, f"{root}.v_proj", gen).reshape(len(gen), *v.shape[1:])
        keys.append(torch.from_numpy(old_k).to(k.dtype))
        values.append(torch.from_numpy(old_v).to(v.dtype))
    return torch.cat(keys), torch.cat(values)


def without_rope(queries: bool, keys: bool) -> Patch:
    """Attention reads what the norms made, before RoPE."""

    def attended(site: "TapProbe", module: object, original: Callable, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        root = site.path.rpartition(".")[0]
        if queries:
            q = in_pass(site, f"{root}.q_norm", experts=True).to(q.dtype)
        if keys:
            new = in_pass(site, f"{root}.k_norm", experts=True).to(k.dtype)
            k = torch.cat([k[: len(k) - len(new)], new])
        return original(q, k, *rest)

    return in_own_pass(attended)


def channels_first(site: "TapProbe", module: object, original: Callable, x: Tensor) -> Tensor:
    """Heads and channels of the attention's output change places before it is projected."""
    heads = site.pipeline.model.config.num_attention_heads
    if site.component.startswith("vit_model"):
        heads = site.pipeline.vit_model.config.num_heads
    return original(x.unflatten(1, (heads, -1)).transpose(1, 2).flatten(1))


HYPOTHESES = [
    *masks.HYPOTHESES,
    Hypothesis("attention scores are not scaled", ANY, scaled(0)),
    Hypothesis("attention scores are divided by head_dim", ANY, scaled(-1)),
    Hypothesis("attention scores are scaled for the width of all heads", ANY, attend_by(scaled_by_width)),
    Hypothesis("keys and values are exchanged", ANY, exchanged(0, 2, 1)),
    Hypothesis("queries and keys are exchanged", ANY[1:], exchanged(1, 0, 2)),
    Hypothesis("keys serve as values", ANY, exchanged(0, 1, 1)),
    Hypothesis("the softmax runs over the queries", ANY, in_dtype(torch.float32, axis=-2)),
    Hypothesis("the softmax computes in bfloat16", ANY, attend_by(softmax_in_bfloat16)),
    Hypothesis("attention computes in bfloat16", ANY, in_dtype(torch.bfloat16)),
    Hypothesis("attention computes in float16", ANY, in_dtype(torch.float16)),
    Hypothesis("attention computes in TF32", ANY, attend_by(in_tf32)),
    Hypothesis("attention rounds only its result", ANY, in_dtype(torch.float32)),
    Hypothesis("hidden scores count as zero", SDPA, attend_by(masked_to_zero)),
    Hypothesis("heads are not put back side by side", ANY, attend_by(heads_apart)),
    Hypothesis("heads and channels are transposed before o_proj", OUTPUT, forward(channels_first)),
    Hypothesis("the cache lacks its last token", SDPA, with_cache(lambda site, k, v: (k[:-1], v[:-1]))),
    Hypothesis("the cache holds its last token twice", SDPA, with_cache(
        lambda site, k, v: (torch.cat([k, k[-1:]]), torch.cat([v, v[-1:]])))),
    Hypothesis("earlier denoising steps stay in the cache", SDPA, with_cache(earlier_steps)),
    Hypothesis("attention reads queries before RoPE", SDPA, without_rope(True, False)),
    Hypothesis("attention reads keys before RoPE", SDPA, without_rope(False, True)),
    Hypothesis("attention reads queries and keys before RoPE", SDPA, without_rope(True, True)),
]  # fmt: skip
