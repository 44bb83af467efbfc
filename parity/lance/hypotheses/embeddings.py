"""Hypotheses about what goes into the language model, and about its logits and velocities."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import reference.arms
from parity.hypotheses.base import DoesNotApply, Hypothesis, Patch
from parity.lance.hypotheses.tools import around, on_input, on_output

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

SUM = ("embeddings",)
TOKENS = ("embed_tokens",)
LLM2VAE = ("llm2vae", "velocity*")


def assembled(make: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]) -> Patch:
    """The embedding of latents made in another way, of the state, the times and the places."""

    def patched(site: "TapProbe"):
        model = site.pipeline.model
        return around(model, "embed_latents", lambda original, *inputs: make(model, *inputs))

    return patched


def weighted(latents: float, time: float, place: float) -> Patch:
    """The three parts of the embedding of a latent, each times a factor."""

    def make(model: nn.Module, x_t: Tensor, timestep: Tensor, places: Tensor) -> Tensor:
        parts = model.vae2llm(x_t), model.time_embedder(timestep), model.latent_pos_embed(places)
        return latents * parts[0] + time * parts[1] + place * parts[2]

    return assembled(make)


def wide_sum(model: nn.Module, x_t: Tensor, timestep: Tensor, places: Tensor) -> Tensor:
    parts = model.vae2llm(x_t), model.time_embedder(timestep), model.latent_pos_embed(places)
    return sum(part.float() for part in parts).to(parts[0].dtype)


def embeds(change: Callable[["TapProbe", Callable, Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Patch:
    """The embeddings of tokens put together in another way."""

    def patched(site: "TapProbe"):
        return around(
            reference.arms.Inputs,
            "embed",
            lambda original, inputs, *args: change(site, lambda *a: original(inputs, *a), inputs, *args),
        )

    return patched


def at_step(site: "TapProbe") -> float:
    """t of the step that the site's call belongs to; of a prefix the first one's."""
    times = site.value("sampler.timestep" + str(site.tap.numbers.get("step", 0)))
    return 1.0 if times is None else float(times.max())


def clean_at_t(site: "TapProbe", embed: Callable, inputs: Any, rows: Tensor, x_t: Tensor, timestep: Tensor):
    if timestep is None:
        raise DoesNotApply
    return embed(rows, x_t, torch.full_like(timestep, at_step(site)))


def vit_turned(site: "TapProbe", embed: Callable, inputs: Any, rows: Tensor, x_t: Tensor, timestep: Tensor):
    """The ViT's tokens of every frame column by column."""
    if inputs.vit is None:
        raise DoesNotApply
    kept, start, parts = inputs.vit, 0, []
    for split in site.layout.vit_splits:
        grid = split.grid
        tokens = kept[start : start + grid.size].unflatten(0, (grid.frames, grid.rows, grid.columns))
        parts.append(tokens.transpose(1, 2).flatten(0, 2))
        start += grid.size
    inputs.vit = torch.cat(parts)
    try:
        return embed(rows, x_t, timestep)
    finally:
        inputs.vit = kept


def vit_left_out(site: "TapProbe", embed: Callable, inputs: Any, rows: Tensor, x_t: Tensor, timestep: Tensor):
    """The placeholder's own embedding stays."""
    out, gen = embed(rows, x_t, timestep)
    seen = inputs.vit_of[rows] >= 0
    out[seen] = inputs.model.language_model.model.embed_tokens(inputs.ids[rows[seen]])
    return out, gen


def one_row_off(kind: str, by: int) -> Patch:
    """Contents one token too early or too late; a bracket is overwritten."""

    def change(site: "TapProbe", embed: Callable, inputs: Any, rows: Tensor, x_t: Tensor, timestep: Tensor):
        out, gen = embed(rows, x_t, timestep)
        places = torch.nonzero((inputs.vit_of if kind == "vit" else inputs.latent_of)[rows] >= 0)[:, 0]
        moved = out.clone()
        inside = (places + by >= 0) & (places + by < len(out))
        moved[places] = inputs.model.language_model.model.embed_tokens(inputs.ids[rows[places]])
        moved[places[inside] + by] = out[places[inside]]
        return moved, gen

    return embeds(change)


def latents_turned(site: "TapProbe", embed: Callable, inputs: Any, rows: Tensor, x_t: Tensor, timestep: Tensor):
    """The latents of every frame column by column."""
    if x_t is None:
        raise DoesNotApply
    parts, start = [], 0
    for split in site.layout.latent_splits:
        grid = split.grid
        own = x_t[start : start + grid.size].unflatten(0, (grid.frames, grid.rows, grid.columns))
        parts.append(own.transpose(1, 2).flatten(0, 2))
        start += grid.size
    return embed(rows, torch.cat(parts), timestep)


def scaled(factor: Callable[[Tensor], float]) -> Patch:
    return on_output(lambda site, x: (x.float() * factor(x)).to(x.dtype))


def capped(x: Tensor) -> Tensor:
    return 30 * torch.tanh(x / 30)


HYPOTHESES = [
    Hypothesis("latents have no position embedding", SUM, weighted(1, 1, 0)),
    Hypothesis("latents have no time embedding", SUM, weighted(1, 0, 1)),
    Hypothesis("latents have neither time nor position embedding", SUM, weighted(1, 0, 0)),
    Hypothesis("latents are left out of their embedding", SUM, weighted(0, 1, 1)),
    Hypothesis("the position embedding counts twice", SUM, weighted(1, 1, 2)),
    Hypothesis("the time embedding counts twice", SUM, weighted(1, 2, 1)),
    Hypothesis("the embeddings are averaged", SUM, weighted(1 / 3, 1 / 3, 1 / 3)),
    Hypothesis("embeddings are summed in float32 and rounded once", SUM, assembled(wide_sum)),
    Hypothesis("embeddings are summed in another order", SUM, assembled(
        lambda model, x_t, t, places: model.vae2llm(x_t) + (model.time_embedder(t) + model.latent_pos_embed(places)))),
    Hypothesis("embeddings are summed place first", SUM, assembled(
        lambda model, x_t, t, places: model.vae2llm(x_t) + model.latent_pos_embed(places) + model.time_embedder(t))),
    Hypothesis("clean latents are embedded at t", SUM, embeds(clean_at_t)),
    Hypothesis("ViT tokens are put in column by column", SUM, embeds(vit_turned)),
    Hypothesis("ViT tokens are left out", SUM, embeds(vit_left_out)),
    Hypothesis("ViT tokens are put in one token too early", SUM, one_row_off("vit", -1)),
    Hypothesis("ViT tokens are put in one token too late", SUM, one_row_off("vit", 1)),
    Hypothesis("latents are put in one token too early", SUM, one_row_off("latents", -1)),
    Hypothesis("latents are put in one token too late", SUM, one_row_off("latents", 1)),
    Hypothesis("latents are put in column by column", (*SUM, "vae2llm"), embeds(latents_turned)),
    Hypothesis("token embeddings are multiplied by sqrt(hidden)", TOKENS, scaled(lambda x: x.shape[-1] ** 0.5)),
    Hypothesis("token embeddings are divided by sqrt(hidden)", TOKENS, scaled(lambda x: x.shape[-1] ** -0.5)),
    Hypothesis("logits are divided by sqrt(hidden)", ("lm_head",), on_input(lambda site, x: x * x.shape[-1] ** -0.5)),
    Hypothesis("logits are capped", ("lm_head",), on_output(lambda site, x: capped(x))),
]  # fmt: skip
