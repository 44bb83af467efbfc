"""What memory the VAE's coding takes, and the tiles that make it fit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lance_mlx.config import SPATIAL_STRIDE
from lance_mlx.errors import LanceError
from lance_mlx.estimate.cost import Convolution
from lance_mlx.model.vae import Grid, TileChooser
from lance_mlx.model.vae_decoder import DecoderShape
from lance_mlx.model.vae_encoder import EncoderShape
from lance_mlx.model.vae_layers import MAX_VALUES
from lance_mlx.model.vae_tiles import SMALLEST

AUTO, NONE = "auto", "none"
_FRAMES = 18
"""Of the widest stage, that exist at once, fitted to what was measured: MLX runs ahead of what it computes by some ten
operations, whose results have their memory already."""
_COARSE = 8
"""Cells by which the tiles that are tried differ."""


@dataclass(frozen=True)
class Coder:
    """One half of the VAE as its memory follows from it.

    Attributes:
        kept: values a cell and latent frame that tiles leave, until the last one is done.
        held: bytes of the weights that are in memory while it runs.
    """

    convolutions: Callable[..., Iterator[Convolution]]
    shape: DecoderShape | EncoderShape
    on_cpu: bool
    kept: int
    held: int

    def memory(self, grid: Grid, tile: int | None = None) -> int:
        """Bytes that exist at once beside the weights, for latents of a grid, in tiles of so many cells or as a whole.

        The largest matrix that a convolution makes, frames of the widest stage, and what tiles leave.
        """
        frames, rows, columns = grid
        if not frames:
            return 0
        chunk = list(self.convolutions(self.shape, self._largest(grid, tile), first=frames == 1))
        unfolded = 4 * max(min(conv.unfolded, MAX_VALUES) for conv in chunk) if self.on_cpu else 0
        left = 0 if tile is None else 4 * self.kept * frames * rows * columns
        return unfolded + _FRAMES * 4 * max(conv.cells * conv.in_channels for conv in chunk) + left

    def fits(self, grid: Grid, tile: int | None, budget: int) -> bool:
        """Whether that goes into `budget` bytes, and no convolution makes more values than MLX addresses."""
        convolutions = self.convolutions(self.shape, self._largest(grid, tile), first=grid[0] == 1)
        # Before its input are two earlier frames.
        values = max(conv.cells * max(2 * conv.in_channels, conv.out_channels) for conv in convolutions)
        return values <= MAX_VALUES and self.held + self.memory(grid, tile) <= budget

    def _largest(self, grid: Grid, tile: int | None) -> int:
        rows, columns = (min(side, tile or side) for side in grid[1:])
        return rows * columns


def tile_chooser(decoder: Coder, encoder: Coder, budget: int) -> TileChooser:
    """The largest tiles that fit into `budget` bytes where the whole does not; the smallest where none do."""

    def choose(grid: Grid, encodes: bool) -> int | None:
        coder = encoder if encodes else decoder
        if max(grid[1:]) <= SMALLEST or coder.fits(grid, None, budget):
            return None
        sides = range((max(grid[1:]) - 1) // _COARSE * _COARSE, SMALLEST, -_COARSE)
        return next((side for side in sides if coder.fits(grid, side, budget)), SMALLEST)

    return choose


def fixed_tiles(side: int) -> TileChooser:
    """Tiles of `side` pixels for every frame that is larger."""
    tile = side // SPATIAL_STRIDE
    return lambda grid, encodes: tile if max(grid[1:]) > tile else None


def read_tiling(value: str | int) -> str | int:
    """What `vae_tiling` means: "auto", "none", or the side of a tile in pixels; raises LanceError for anything else."""
    if value in (AUTO, NONE):
        return value
    least = SMALLEST * SPATIAL_STRIDE
    try:
        side = int(value)
    except ValueError:
        side = 0
    if side < least or side % SPATIAL_STRIDE:
        least = f"a multiple of {SPATIAL_STRIDE} from {least}"
        raise LanceError(f"vae_tiling {value} must be {AUTO}, {NONE}, or the side of a tile in pixels, {least}")
    return side
