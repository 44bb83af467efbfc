"""The Lance model without its VAE: latent embeddings around the language model."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lance_mlx.backend.numerics import Numerics
from lance_mlx.config import LATENT_CHANNELS, MAX_LATENT_FRAMES, MAX_LATENT_SIDE, LanceConfig
from lance_mlx.errors import LanceError
from lance_mlx.model.layers import Linear, SiLU
from lance_mlx.model.mot import LanguageModel
from lance_mlx.model.vit import VisionTransformer, ViTConfig
from lance_mlx.sequence.positions import latent_position_ids

TIMESTEP_FEATURES = 256
MAX_PERIOD = 10000


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of t, then a two-layer MLP (bytedance/Lance modeling/lance/modeling_utils.py)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = [Linear(TIMESTEP_FEATURES, hidden_size), SiLU(), Linear(hidden_size, hidden_size)]

    def __call__(self, timesteps: np.ndarray) -> mx.array:
        """t in [0, 1], float32 [n] -> [n, hidden]; cosines come before sines."""
        half = TIMESTEP_FEATURES // 2
        exponents = -math.log(MAX_PERIOD) * np.arange(half) / half
        angles = timesteps.astype(np.float32)[:, None] * np.exp(exponents).astype(np.float32)
        x = mx.array(np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32))
        for layer in self.mlp:
            x = layer(x)
        return x


class LatentPositionEmbedding(nn.Module):
    """Fixed 3-D sine-cosine embedding of latent cells; computed, never read from the checkpoint."""

    def __init__(self, hidden_size: int, numerics: Numerics) -> None:
        super().__init__()
        self._hidden_size = hidden_size
        self._dtype = numerics.dtype

    def __call__(self, grid: tuple[int, int, int]) -> mx.array:
        """(t, h, w) cells -> [t*h*w, hidden]: a third of the channels each for t and h, rounded down to even, the
        rest for w.

        Raises:
            LanceError: the block reaches beyond the table.
        """
        third = self._hidden_size // 3 // 2 * 2
        widths = (third, third, self._hidden_size - 2 * third)
        places = latent_position_ids(grid)
        table = (MAX_LATENT_FRAMES, MAX_LATENT_SIDE, MAX_LATENT_SIDE)
        if places.max() >= math.prod(table):
            raise LanceError(f"{grid} latent frames, rows and columns reach beyond the position table {table}")
        # A block wider than the table runs on into the table's next row, as it does upstream.
        cells = np.unravel_index(places, table)
        parts = []
        for index, size, width in zip(cells, table, widths, strict=True):
            frequencies = 1.0 / 10000 ** (np.arange(width // 2) / (width / 2))
            angles = np.arange(size)[:, None] * frequencies
            values = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
            parts.append(mx.array(values).astype(self._dtype)[mx.array(index)])
        return mx.concatenate(parts, axis=-1)


class Lance(nn.Module):
    """Language model, latent projections and for tasks that look the ViT, with the checkpoint's parameter names.

    Attributes:
        config, numerics: what it was built with.
    """

    def __init__(self, config: LanceConfig, numerics: Numerics, vit_config: ViTConfig | None = None) -> None:
        super().__init__()
        self._config, self._numerics = config, numerics
        self.language_model = LanguageModel(config)
        self.vae2llm = Linear(LATENT_CHANNELS, config.hidden_size)
        self.llm2vae = Linear(config.hidden_size, LATENT_CHANNELS)
        self.time_embedder = TimestepEmbedder(config.hidden_size)
        self.latent_pos_embed = LatentPositionEmbedding(config.hidden_size, numerics)
        if vit_config is not None:
            self.vit_model = VisionTransformer(vit_config, numerics)

    @property
    def config(self) -> LanceConfig:
        return self._config

    @property
    def numerics(self) -> Numerics:
        return self._numerics

    def embed_latents(self, latents: mx.array, timesteps: np.ndarray, positions: mx.array) -> mx.array:
        """Input embeddings of latent tokens, [n, hidden].

        Args:
            latents: [n, 48].
            timesteps: t of each token, float32 [n]; 0 for a clean condition.
            positions: [n, hidden], from `latent_pos_embed`.
        """
        # Few distinct times: embed each once.
        times, index = np.unique(timesteps, return_inverse=True)
        embedded = self.time_embedder(times)
        if len(times) > 1:
            embedded = embedded[mx.array(index)]
        return self.vae2llm(latents) + embedded + positions
