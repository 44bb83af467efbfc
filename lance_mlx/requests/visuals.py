"""Pictures and videos as the model takes them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lance_mlx.config import SPATIAL_STRIDE, TEMPORAL_STRIDE
from lance_mlx.media.preprocess import MERGE_SIZE, vae_pixels, vit_patches
from lance_mlx.media.read import read_visual
from lance_mlx.requests.request import Question, Request, Task


@dataclass(frozen=True, eq=False)
class PreparedVisual:
    """One picture or video after resizing, for the ViT and for the VAE; what a task does not need is None.

    Attributes:
        vit_patches: float32 [n, 1176], n = t*h*w.
        vit_grid: (t, h, w) in patches.
        pixels: float32 [frames, height, width, 3] in [-1, 1].
    """

    vit_patches: np.ndarray | None = None
    vit_grid: tuple[int, int, int] | None = None
    pixels: np.ndarray | None = None

    @property
    def vit_cells(self) -> tuple[int, int, int]:
        """The ViT's grid after merging patches, in tokens."""
        t, h, w = self.vit_grid
        return t, h // MERGE_SIZE, w // MERGE_SIZE

    @property
    def latent_grid(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        frames, height, width = self.pixels.shape[:3]
        return (frames - 1) // TEMPORAL_STRIDE + 1, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE


def prepare_visuals(request: Request | Question) -> list[PreparedVisual]:
    """Read and resize the visuals of a request for what its task looks with: the ViT, the VAE or both.

    Raises:
        LanceError: a file cannot be used.
    """
    prepared = []
    for visual in request.visuals:
        frames = read_visual(visual.path, visual.kind, request.as_upstream).pixels
        patches = grid = pixels = None
        if request.task is not Task.I2V:
            patches, grid = vit_patches(frames, request.vit_resolution)
        if not request.task.answers:
            pixels = vae_pixels(frames, request.vae_resolution)
        prepared.append(PreparedVisual(patches, grid, pixels))
    return prepared


def sized_by_source(request: Request, visuals: Sequence[PreparedVisual]) -> Request:
    """The request with the size that its source dictates: editing keeps size and frames, i2v keeps the size."""
    if not request.task.size_from_source:
        return request
    frames, height, width = visuals[-1].pixels.shape[:3]
    if request.task is Task.I2V:
        return replace(request, height=height, width=width)
    return replace(request, height=height, width=width, num_frames=frames)
