"""What a pass costs: floating point operations of the transformer and of the VAE, counted from their sizes."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lance_mlx.config import LATENT_CHANNELS, LanceConfig
from lance_mlx.model.vae_decoder import DecoderShape
from lance_mlx.model.vae_encoder import EncoderShape
from lance_mlx.model.vae_layers import PACKED_CHANNELS
from lance_mlx.sequence.segments import Sequence


def expert_weights(config: LanceConfig) -> int:
    """Weights of one expert's projections in one layer: what a token is multiplied with."""
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    return config.hidden_size * (2 * heads + 2 * kv_heads + 3 * config.intermediate_size)


def pass_operations(config: LanceConfig, rows: int, keys: int) -> int:
    """Floating point operations of a pass of `rows` tokens, each of one expert, which see `keys` tokens.

    A multiplication and an addition count as two. Norms, RoPE and activations are left out: a few in a thousand.
    """
    projections = 2 * rows * expert_weights(config)
    attention = 4 * rows * keys * config.num_attention_heads * config.head_dim
    return config.num_hidden_layers * (projections + attention)


def step_operations(config: LanceConfig, arms: Iterable[Sequence]) -> int:
    """Floating point operations of a denoising step: each arm passes the denoised block, which sees its prefix and
    itself."""
    return sum(pass_operations(config, len(arm.target), arm.starts[arm.target_index] + len(arm.target)) for arm in arms)


class Convolution(NamedTuple):
    """A convolution of the VAE: cells of its output over all frames, and places of its kernel that meet each."""

    cells: int
    taps: int
    in_channels: int
    out_channels: int

    @property
    def operations(self) -> int:
        """Floating point operations."""
        return 2 * self.cells * self.taps * self.in_channels * self.out_channels

    @property
    def unfolded(self) -> int:
        """Values of the matrix that MLX's CPU backend multiplies with the kernel."""
        return self.cells * self.taps * self.in_channels


def decoder_convolutions(shape: DecoderShape, cells: int, first: bool) -> Iterator[Convolution]:
    """Those that decode one latent frame of `cells` cells, the first one of a video or a later one."""
    depth, width = 1 if first else 3, shape.channels
    yield Convolution(cells, 1, LATENT_CHANNELS, LATENT_CHANNELS)
    yield Convolution(cells, 9 * depth, LATENT_CHANNELS, width)
    yield from _middle(cells, depth, width)
    for block in shape.up_blocks:
        yield from _residual(cells, depth, block.in_channels, block.out_channels, block.num_residual_blocks)
        width = block.out_channels
        if block.upsamples_time and not first:
            yield Convolution(cells, 3, width, 2 * width)
            cells *= 2
        if block.upsamples_space:
            cells *= 4
            yield Convolution(cells, 9, width, width)
    yield Convolution(cells, 9 * depth, width, PACKED_CHANNELS)


def encoder_convolutions(shape: EncoderShape, cells: int, first: bool) -> Iterator[Convolution]:
    """Those that encode one latent frame of `cells` cells, the first one of a video or a later one."""
    depth, width = 1 if first else 3, shape.channels
    cells *= 4 ** sum(block.downsamples_space for block in shape.down_blocks)
    cells *= 1 if first else 2 ** sum(block.downsamples_time for block in shape.down_blocks)
    yield Convolution(cells, 9 * depth, PACKED_CHANNELS, width)
    for block in shape.down_blocks:
        yield from _residual(cells, depth, block.in_channels, block.out_channels, block.num_residual_blocks)
        width = block.out_channels
        if block.downsamples_space:
            cells //= 4
            yield Convolution(cells, 9, width, width)
        if block.downsamples_time and not first:
            cells //= 2
            yield Convolution(cells, 3, width, width)
    yield from _middle(cells, depth, width)
    yield Convolution(cells, 9 * depth, width, 2 * LATENT_CHANNELS)
    yield Convolution(cells, 1, 2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS)


def _residual(cells: int, depth: int, in_channels: int, out_channels: int, blocks: int) -> Iterator[Convolution]:
    for index in range(blocks):
        width = out_channels if index else in_channels
        yield Convolution(cells, 9 * depth, width, out_channels)
        yield Convolution(cells, 9 * depth, out_channels, out_channels)
        if width != out_channels:
            yield Convolution(cells, 1, width, out_channels)


def _middle(cells: int, depth: int, width: int) -> Iterator[Convolution]:
    yield from _residual(cells, depth, width, width, 2)
    yield Convolution(cells, 1, width, 3 * width)
    yield Convolution(cells, 1, width, width)
