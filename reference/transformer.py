"""The transformer with its visual inputs and outputs."""

from torch import Tensor, nn

from reference.config import LanguageConfig
from reference.embeddings import LatentPositionEmbedding, TimestepEmbedder
from reference.mot import LanguageModel
from reference.numerics import Linear, Numerics
from reference.vae_layers import LATENT_CHANNELS


class Lance(nn.Module):
    """Everything but the vision tower and the VAE; attribute paths are the checkpoint's names."""

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
