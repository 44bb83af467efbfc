"""Lance as one module with the checkpoint's names, and the arms that run it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from reference.config import LanguageConfig
from reference.embeddings import LatentPositionEmbedding, TimestepEmbedder
from reference.errors import ReferenceError
from reference.layout import Layout, Role, build_layout
from reference.mot import KVCache, LanguageModel, visible
from reference.numerics import Linear, Numerics
from reference.prompt import Tokenizer
from reference.request import Request
from reference.sampler import Arm
from reference.vae import LATENT_CHANNELS, VAE
from reference.weights import load_transformer, load_vae, variant_folder


class Lance(nn.Module):
    """The transformer with its visual inputs and outputs; attribute paths are the checkpoint's names."""

    def __init__(self, config: LanguageConfig, numerics: Numerics) -> None:
        super().__init__()
        self.config, self.numerics = config, numerics
        self.language_model = LanguageModel(config, numerics)
        self.vae2llm = Linear(LATENT_CHANNELS, config.hidden_size, True, numerics)
        self.llm2vae = Linear(config.hidden_size, LATENT_CHANNELS, True, numerics)
        self.time_embedder = TimestepEmbedder(config.hidden_size, numerics)
        self.latent_pos_embed = LatentPositionEmbedding(config.hidden_size, numerics)

    def embed_latents(self, x_t: Tensor, timestep: Tensor, latent_position_ids: Tensor) -> Tensor:
        """State [latents, 48] -> inputs_embeds [latents, hidden]: vae2llm + time + place, in this order."""
        return self.vae2llm(x_t) + self.time_embedder(timestep) + self.latent_pos_embed(latent_position_ids)


class CachedArm:
    """An arm of the KV-cache entry: its prefix runs once, a denoising step runs the target block alone.

    The unconditional arm's prefix keeps the CONDITIONAL position ids of the splits it keeps, while its target block
    uses ids recomputed without the user's text (lance.py:validation_gen_KVcache).
    """

    def __init__(self, name: str, model: Lance, layout: Layout, device: torch.device) -> None:
        self.name, self.model, self.layout = name, model, layout
        self.splits = [split for split in layout.prefix if name == "cond" or split.role is not Role.TEXT]
        self.prefixes = len(self.splits)
        self.ids = torch.from_numpy(layout.text_ids).to(device)
        self.position_ids = torch.from_numpy(layout.position_ids).to(device)
        own_ids = layout.position_ids if name == "cond" else layout.uncond_position_ids
        start = sum(split.length for split in self.splits)
        self.target_position_ids = torch.from_numpy(own_ids[:, start : start + layout.target.length]).to(device)
        self.latent_position_ids = torch.from_numpy(layout.latent_position_ids).to(device)
        self.cache = KVCache()

    @torch.inference_mode()
    def prefill(self, index: int) -> None:
        """Append prefix split number `index` to the cache; splits come in order."""
        split = self.splits[index]
        past = self.cache.length
        device = self.ids.device
        self.model.language_model(
            inputs_embeds=self.model.language_model.model.embed_tokens(self.ids[split.rows]),
            position_ids=self.position_ids[:, split.rows],
            gen=torch.zeros(split.length, dtype=torch.bool, device=device),
            mask=visible(range(past, past + split.length), past + split.length, None).to(device),
            cache=self.cache,
            keep=True,
            raise_qk=False,
        )

    @torch.inference_mode()
    def velocity(self, step: int, x_t: Tensor, timestep: Tensor) -> Tensor:
        """Velocity [latents, 48]; the target block sees the whole prefix and itself."""
        target = self.layout.target
        embeds = self.model.language_model.model.embed_tokens(self.ids[target.rows])
        embeds[1:-1] = self.model.embed_latents(x_t, timestep, self.latent_position_ids)
        gen = torch.ones(target.length, dtype=torch.bool, device=embeds.device)
        gen[[0, -1]] = False
        hidden = self.model.language_model(
            inputs_embeds=embeds,
            position_ids=self.target_position_ids,
            gen=gen,
            mask=None,
            cache=self.cache,
            keep=False,
            raise_qk=True,
        )
        return self.model.llm2vae(hidden)[1:-1]


class FullSequenceArm:
    """An arm of the full-sequence entry: every step runs all tokens under an explicit mask.

    The unconditional arm's position ids are all recomputed without the user's text (lance.py:validation_gen).
    """

    prefixes = 0

    def __init__(self, name: str, model: Lance, layout: Layout, device: torch.device) -> None:
        self.name, self.model, self.layout = name, model, layout
        rows = slice(None) if name == "cond" else layout.kept
        ids = layout.position_ids if name == "cond" else layout.uncond_position_ids
        self.ids = torch.from_numpy(layout.text_ids[rows]).to(device)
        self.position_ids = torch.from_numpy(ids).to(device)
        self.latent_position_ids = torch.from_numpy(layout.latent_position_ids).to(device)
        dropped = len(layout.text_ids) - len(self.ids)
        target = range(layout.target.start - dropped, layout.target.stop - dropped)
        length = len(self.ids)
        self.mask = visible(range(length), length, target).to(device)
        self.gen = torch.zeros(length, dtype=torch.bool, device=device)
        self.gen[target.start + 1 : target.stop - 1] = True

    def prefill(self, index: int) -> None:
        """Nothing is cached in this entry."""
        raise ReferenceError("the full-sequence entry has no prefix to run")

    @torch.inference_mode()
    def velocity(self, step: int, x_t: Tensor, timestep: Tensor) -> Tensor:
        """Velocity [latents, 48] from a pass over the whole sequence."""
        embeds = self.model.language_model.model.embed_tokens(self.ids)
        embeds[self.gen] = self.model.embed_latents(x_t, timestep, self.latent_position_ids)
        hidden = self.model.language_model(
            inputs_embeds=embeds,
            position_ids=self.position_ids,
            gen=self.gen,
            mask=self.mask,
            cache=KVCache(),
            keep=False,
            raise_qk=False,
        )
        return self.model.llm2vae(hidden[self.gen])


ENTRIES = {"kv_cache": CachedArm, "full_sequence": FullSequenceArm}


@dataclass(frozen=True)
class Pipeline:
    """Everything that a generation needs, loaded from one checkpoint folder."""

    tokenizer: Tokenizer
    model: Lance
    vae: VAE
    numerics: Numerics
    device: torch.device

    @classmethod
    def load(cls, checkpoint: Path, variant: str, numerics: Numerics, device: str = "cpu") -> "Pipeline":
        """Load "Lance_3B" or "Lance_3B_Video" of a folder in the official layout; raises ReferenceError."""
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ReferenceError(f"device '{device}' is not available ({str(error).splitlines()[0]})") from None
        folder, place = variant_folder(checkpoint, variant), torch.device(device)
        config = LanguageConfig.from_file(folder / "llm_config.json")
        tokenizer = Tokenizer(folder)
        for key, token in (
            ("vision_start_token_id", tokenizer.vision_start),
            ("vision_end_token_id", tokenizer.vision_end),
            ("image_token_id", tokenizer.image_pad),
            ("video_token_id", tokenizer.video_pad),
        ):
            if getattr(config, key) != token:
                raise ReferenceError(f"{folder}: {key} is {getattr(config, key)}, the tokenizer says {token}")
        with torch.device("meta"):
            model = Lance(config, numerics)
        load_transformer(model, folder / "model.safetensors", numerics, place)
        vae = load_vae(Path(checkpoint) / "Wan2.2_VAE.pth", numerics, place)
        return cls(tokenizer, model.eval(), vae, numerics, place)

    def layout(self, request: Request) -> Layout:
        """The request's sequence with this checkpoint's tokenizer."""
        return build_layout(request, self.tokenizer, self.model.config.tokens_per_second)

    def arms(self, request: Request, layout: Layout, entry: str) -> tuple[Arm, Arm | None]:
        """The conditional arm and the unconditional one (None when the request is not guided)."""
        if entry not in ENTRIES:
            raise ReferenceError(f"entry '{entry}' is not one of {', '.join(ENTRIES)}")
        build = ENTRIES[entry]
        cond = build("cond", self.model, layout, self.device)
        return cond, build("uncond", self.model, layout, self.device) if request.guided else None
