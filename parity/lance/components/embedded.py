"""What goes into the language model: embedded tokens, times and places, and their sums."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from parity.hypotheses.base import DoesNotApply
from parity.lance.components.base import Known, array_of, parameter
from parity.lance.hypotheses.tokens import arm_splits, calls_of
from parity.lance.hypotheses.tools import times_of
from parity.laws.waves import Perceptron, Waves
from reference.embeddings import FEATURES, MAX_PERIOD
from reference.layout import Mode
from reference.positions import LATENT_SIDE

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

Read = tuple[dict[str, np.ndarray], dict[str, Any]]
ROWS = ("token", "channel")


def rows_of(site: "TapProbe") -> np.ndarray:
    """The tokens of the layout that the site's call computes."""
    rows = dict(calls_of(site)).get(site.tap.call)
    if rows is None:
        raise DoesNotApply
    kept = np.concatenate([np.arange(split.start, split.stop) for split in arm_splits(site)])
    if rows.stop > len(kept):
        raise DoesNotApply
    return kept[rows]


def latents_of(site: "TapProbe", rows: np.ndarray) -> np.ndarray:
    """Of each token its place among all latents, -1 where it is none."""
    if site.layout.answer is not None:
        return np.full(len(rows), -1)
    order = np.full(len(site.layout.text_ids), -1)
    order[site.layout.latent_rows] = np.arange(len(site.layout.latent_rows))
    return order[rows]


def embed_tokens(site: "TapProbe") -> Read:
    """Token ids [n] of the tokens that are no latents; the table [vocabulary, hidden]."""
    if site.tap.name.startswith("weights/"):
        raise DoesNotApply
    table = array_of(site.pipeline.model.language_model.model.embed_tokens.weight)
    rows = rows_of(site)
    for kept in (rows, rows[latents_of(site, rows) < 0]):
        if len(kept) == len(site.expected):
            ids = site.layout.text_ids[kept]
            return {"ids": ids}, {"table": table, "axes": ROWS, "what": "the embedding"}
    raise DoesNotApply


def places(site: "TapProbe") -> Read:
    """Frames, rows and columns [n, 3] of latents."""
    latents = latents_of(site, rows_of(site))
    ids = site.layout.latent_position_ids[latents[latents >= 0]]
    if len(ids) != len(site.expected):
        raise DoesNotApply
    widths = site.pipeline.model.latent_pos_embed.widths
    facts = {
        "widths": widths,
        "waves": Waves(MAX_PERIOD, "sines first"),
        "names": ("frames", "rows", "columns"),
        "axes": ("latent", "channel"),
        "what": "the embedding of places",
        "grid": _grid(site, len(ids)),
    }
    return {"places": np.stack(np.unravel_index(ids, (LATENT_SIDE,) * 3), 1)}, facts


def _grid(site: "TapProbe", count: int) -> tuple[int, int, int] | None:
    found = [split.grid for split in arm_splits(site) if split.mode in (Mode.FULL_NOISE, Mode.NOISE)]
    found = [grid for grid in found if grid.size == count]
    return (found[-1].frames, found[-1].rows, found[-1].columns) if found else None


def time_embedder(site: "TapProbe") -> Read:
    """t of every row [n]; which time a row is of is seen from what is embedded."""
    if site.tap.name.startswith("weights/"):
        raise DoesNotApply
    embedder, times = site.pipeline.model.time_embedder, times_of(site)
    known = np.unique(np.append(times, 0).astype(np.float32))
    rows = site.expected.reshape(-1, site.expected.shape[-1])
    with torch.inference_mode():
        embedded = array_of(embedder(torch.from_numpy(known).to(site.pipeline.device)))
    apart = np.linalg.norm(rows[:, None] - embedded[None], axis=2)
    numbers = known[apart.argmin(1)]
    first, _, second = embedder.mlp
    layers = Perceptron(
        *(array_of(p).astype(np.float64) for p in (first.weight, first.bias, second.weight, second.bias))
    )
    step = site.tap.numbers.get("step", 0)
    facts = {
        "waves": Waves(MAX_PERIOD, "cosines first"),
        "width": FEATURES,
        "layers": layers,
        "times": {
            "that of the step after it": times[min(step + 1, len(times) - 1)],
            "that of the step before it": times[max(step - 1, 0)],
            "0": 0.0,
            "1": 1.0,
            "the number of the step": float(step),
        },
        "axes": ("time", "channel")[-site.expected.ndim :],
        "what": "the embedding of t",
    }
    inputs, product = _activated(embedder, numbers)
    return {**inputs, "numbers": numbers}, {**product, **facts}


def _activated(embedder: nn.Module, numbers: np.ndarray) -> Read:
    """What goes into the embedder's activation and comes out of it, [n, hidden]; the product behind it."""
    first, function, last = embedder.mlp
    seen: list[torch.Tensor] = []
    handles = [part.register_forward_hook(lambda part, args, out: seen.append(out)) for part in (first, function)]
    try:
        with torch.inference_mode():
            embedder(torch.from_numpy(numbers).to(last.weight.device))
    finally:
        for handle in handles:
            handle.remove()
    facts = {"weight": parameter(last, "weight"), "bias": parameter(last, "bias"), "activation": "SiLU"}
    return {"gate": array_of(seen[0]), "x": array_of(seen[1])}, facts


def hidden_in(site: "TapProbe") -> Read:
    """What the input embeddings [n, hidden] are put together from, each 0 in the rows that it has no part in."""
    rows, model = rows_of(site), site.pipeline.model
    if len(rows) != len(site.expected):
        raise DoesNotApply
    table = array_of(model.language_model.model.embed_tokens.weight)
    parts = {"the tokens' embeddings": table[site.layout.text_ids[rows]]}
    latents = latents_of(site, rows)
    gen = latents >= 0
    call = site.tap.call
    if gen.any():
        step = site.tap.numbers.get("step")
        timestep = site.value(f"sampler.timestep{step}") if step is not None else np.zeros(len(site.layout.latent_rows))
        with torch.inference_mode():
            times = torch.from_numpy(np.asarray(timestep, np.float32)[latents[gen]]).to(site.pipeline.device)
            own = {"the times' embeddings": array_of(model.time_embedder(times))}
        own["the latents"] = site.value(f"{call}/vae2llm")
        own["the places' embeddings"] = site.value(f"{call}/latent_pos_embed")
        for name, value in own.items():
            if value is not None and len(value) == gen.sum():
                parts[name] = _spread(value, gen, site.expected.shape)
    seen = np.isin(rows, site.layout.vit_rows)
    vit = site.value("vit_model0")
    if seen.any() and vit is not None and len(vit) == len(site.layout.vit_rows):
        order = np.searchsorted(np.sort(site.layout.vit_rows), rows[seen])
        parts["the ViT's tokens"] = _spread(vit[order], seen, site.expected.shape)
    added = {name: gen for name in parts} | {"the tokens' embeddings": ~gen & ~seen, "the ViT's tokens": seen}
    facts = {"axes": ROWS, "what": "the input embedding", "added": {name: added[name] for name in parts}}
    return parts, facts


def _spread(value: np.ndarray, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    whole = np.zeros(shape, np.float32)
    whole[rows] = value
    return whole


KNOWN = (
    Known("embedding", ("embed_tokens",), embed_tokens),
    Known("sinusoids", ("latent_pos_embed",), places),
    Known("time", ("time_embedder",), time_embedder),
    Known("array", ("embeddings",), hidden_in),
)
