"""Embeddings of a timestep and of a latent's place in the video."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from reference.numerics import Linear, Numerics
from reference.positions import LATENT_SIDE

FEATURES = 256
MAX_PERIOD = 10000


class TimestepEmbedder(nn.Module):
    """timestep float32 [n] in [0, 1] -> [n, hidden]: 256 cosines and sines, Linear, SiLU, Linear.

    (bytedance/Lance modeling/lance/modeling_utils.py:TimestepEmbedder)
    """

    def __init__(self, hidden_size: int, numerics: Numerics) -> None:
        super().__init__()
        first = Linear(FEATURES, hidden_size, True, numerics)
        self.mlp = nn.Sequential(first, nn.SiLU(), Linear(hidden_size, hidden_size, True, numerics))

    def forward(self, timestep: Tensor) -> Tensor:
        half = FEATURES // 2
        steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
        angles = timestep[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps / half)[None]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class LatentPositionEmbedding(nn.Module):
    """latent_position_ids [n] -> rows [n, hidden] of a fixed 3-D sine-cosine table.

    The table is computed, never loaded: t and h get hidden // 3 features rounded down to even, w the rest, each axis
    sines then cosines (bytedance/Lance modeling/lance/modeling_utils.py:PositionEmbedding3D).
    """

    def __init__(self, hidden_size: int, numerics: Numerics) -> None:
        super().__init__()
        self.numerics = numerics
        axis = hidden_size // 3 // 2 * 2
        self.widths = (axis, axis, hidden_size - 2 * axis)

    def forward(self, position_ids: Tensor) -> Tensor:
        ids = position_ids.long()
        places = (ids // LATENT_SIDE**2, ids // LATENT_SIDE % LATENT_SIDE, ids % LATENT_SIDE)
        return torch.cat([self.axis(place, width) for place, width in zip(places, self.widths, strict=True)], 1)

    def axis(self, places: Tensor, width: int) -> Tensor:
        """Sines then cosines [n, width] of the places [n] along one axis, computed in float64."""
        omega = 1.0 / MAX_PERIOD ** (np.arange(width // 2, dtype=np.float64) / (width / 2.0))
        angles = np.arange(int(places.max()) + 1)[:, None] * omega[None]
        table = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))
        return table.float().to(places.device, self.numerics.torch_dtype)[places]
