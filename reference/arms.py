"""The two entries of generation: what runs a conditioning's prefix and its target block."""

import torch
from torch import Tensor

from reference.errors import ReferenceError
from reference.layout import Layout, Mode, Role, Split
from reference.mot import KVCache, causal, visible
from reference.request import Request
from reference.sampler import Arm
from reference.transformer import Lance


class Inputs:
    """What the tokens of a sequence are embedded from.

    vit: merged tokens [ViT tokens, hidden] or None. Places of tokens are given as int64.
    made: the latents that denoising moves, by their place among all latents.
    """

    def __init__(self, model: Lance, layout: Layout, vit: Tensor | None, device: torch.device) -> None:
        self.model, self.layout, self.vit, self.device = model, layout, vit, device
        self.ids = torch.from_numpy(layout.text_ids).to(device)
        self.position_ids = torch.from_numpy(layout.position_ids).to(device)
        # Place of every token among the latents and among the ViT's tokens; -1 where it is neither.
        self.latent_of, self.vit_of = (torch.full((len(layout.text_ids),), -1, device=device) for _ in range(2))
        self.vit_of[torch.from_numpy(layout.vit_rows).long()] = torch.arange(len(layout.vit_rows), device=device)
        if layout.answer is None:
            rows = torch.from_numpy(layout.latent_rows).long()
            self.latent_of[rows] = torch.arange(len(rows), device=device)
            self.made = self.latent_of[torch.from_numpy(layout.made_rows).long()]
            self.latent_position_ids = torch.from_numpy(layout.latent_position_ids).to(device)

    def embed(self, rows: Tensor, x_t: Tensor | None, timestep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings [n, hidden] of the tokens `rows`, and which of them are the generation expert's, bool [n].

        x_t [latents, 48] and timestep float32 [latents] are those of the whole state.
        """
        embeds = self.model.language_model.model.embed_tokens(self.ids[rows])
        seen, latents = self.vit_of[rows], self.latent_of[rows]
        if (seen >= 0).any():
            embeds[seen >= 0] = self.vit[seen[seen >= 0]]
        gen = latents >= 0
        if gen.any():
            own = latents[gen]
            embeds[gen] = self.model.embed_latents(x_t[own], timestep[own], self.latent_position_ids[own])
        return embeds, gen

    def rows_of(self, split: Split) -> Tensor:
        """Places of a split's tokens."""
        return torch.arange(split.start, split.stop, device=self.device)

    def prefill(self, split: Split, cache: KVCache, x_t: Tensor | None = None, timestep: Tensor | None = None) -> None:
        """Append a split to a cache: causal, or seeing the whole of itself."""
        rows = self.rows_of(split)
        embeds, gen = self.embed(rows, x_t, timestep)
        mask = causal(split.length, cache.length).to(self.device) if split.mode is Mode.CAUSAL else None
        self.model.language_model(
            inputs_embeds=embeds,
            position_ids=self.position_ids[:, rows],
            gen=gen,
            mask=mask,
            cache=cache,
            keep=True,
            raise_qk=bool(gen.any()),
        )


class CachedArm:
    """An arm of the KV-cache entry: its prefix runs once, a denoising step runs the target block alone.

    The unconditional arm's prefix keeps the CONDITIONAL position ids of the splits it keeps, while its target block
    uses ids recomputed without the user's text (lance.py:validation_gen_KVcache).
    """

    def __init__(self, name: str, inputs: Inputs, x_init: Tensor) -> None:
        self.name, self.inputs, self.x_init = name, inputs, x_init
        layout = inputs.layout
        self.splits = [split for split in layout.prefix if name == "cond" or split.role is not Role.TEXT]
        self.prefixes = len(self.splits)
        own_ids = layout.position_ids if name == "cond" else layout.uncond_position_ids
        start = sum(split.length for split in self.splits)
        self.position_ids = torch.from_numpy(own_ids[:, start : start + layout.target.length]).to(inputs.device)
        self.rows = inputs.latent_of[torch.from_numpy(layout.target.inside).long()]
        self.made = inputs.made
        self.cache = KVCache()

    @torch.inference_mode()
    def prefill(self, index: int) -> None:
        """Append prefix split number `index` to the cache; splits come in order, clean latents at t = 0."""
        clean = torch.zeros(len(self.x_init), device=self.x_init.device)
        self.inputs.prefill(self.splits[index], self.cache, self.x_init, clean)

    @torch.inference_mode()
    def velocity(self, step: int, x_t: Tensor, timestep: Tensor) -> Tensor:
        """Velocity of the target's latents; the target block sees the whole prefix and itself."""
        embeds, gen = self.inputs.embed(self.inputs.rows_of(self.inputs.layout.target), x_t, timestep)
        hidden = self.inputs.model.language_model(
            inputs_embeds=embeds,
            position_ids=self.position_ids,
            gen=gen,
            mask=None,
            cache=self.cache,
            keep=False,
            raise_qk=True,
        )
        return self.inputs.model.llm2vae(hidden)[gen]


class FullSequenceArm:
    """An arm of the full-sequence entry: every step runs all tokens under an explicit mask.

    The unconditional arm's position ids are all recomputed without the user's text (lance.py:validation_gen).
    """

    prefixes = 0

    def __init__(self, name: str, inputs: Inputs, x_init: Tensor) -> None:
        self.name, self.inputs = name, inputs
        layout, device = inputs.layout, inputs.device
        splits = [split for split in layout.splits if name == "cond" or split.role is not Role.TEXT]
        self.tokens = torch.cat([inputs.rows_of(split) for split in splits])
        ids = layout.position_ids if name == "cond" else layout.uncond_position_ids
        self.position_ids = torch.from_numpy(ids).to(device)
        self.mask = visible([split.length for split in splits], [split.mode for split in splits]).to(device)
        self.rows = self.made = inputs.made
        self.asked = torch.isin(self.tokens, torch.from_numpy(layout.made_rows).long().to(device))

    def prefill(self, index: int) -> None:
        """Nothing is cached in this entry."""
        raise ReferenceError("the full-sequence entry has no prefix to run")

    @torch.inference_mode()
    def velocity(self, step: int, x_t: Tensor, timestep: Tensor) -> Tensor:
        """Velocity of the latents that are made, from a pass over the whole sequence."""
        embeds, gen = self.inputs.embed(self.tokens, x_t, timestep)
        hidden = self.inputs.model.language_model(
            inputs_embeds=embeds,
            position_ids=self.position_ids,
            gen=gen,
            mask=self.mask,
            cache=KVCache(),
            keep=False,
            raise_qk=False,
        )
        return self.inputs.model.llm2vae(hidden[self.asked])


ENTRIES = {"kv_cache": CachedArm, "full_sequence": FullSequenceArm}


def check_entry(entry: str) -> None:
    """Raise ReferenceError for an entry that upstream does not have."""
    if entry not in ENTRIES:
        raise ReferenceError(f"entry '{entry}' is not one of {', '.join(ENTRIES)}")


def build_arms(inputs: Inputs, request: Request, entry: str, x_init: Tensor) -> tuple[Arm, Arm | None]:
    """The conditional arm and the unconditional one (None when the request is not guided)."""
    check_entry(entry)
    build = ENTRIES[entry]
    return build("cond", inputs, x_init), build("uncond", inputs, x_init) if request.guided else None
