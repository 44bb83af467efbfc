"""Wan2.2's VAE decoder: one latent frame at a time, with explicit stream state.

Shapes: [1, C, T, H, W]. Structure and widths are read from the shapes in the state dict.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.errors import ReferenceError
from reference.numerics import Numerics
from reference.vae_layers import (
    LATENT_CHANNELS,
    PATCH,
    AttentionBlock,
    CausalConv3d,
    Conv2d,
    ResidualBlock,
    RMSNorm,
    StreamState,
)


class Resample(nn.Module):
    """Twice the rows and columns, and with a time convolution twice the frames of all but the stream's first chunk."""

    def __init__(self, channels: int, temporal: bool, numerics: Numerics) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": Conv2d(channels, channels, 3, numerics)})
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1), numerics) if temporal else None

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        if self.time_conv is not None and state.chunks > 0:
            # The first chunk passes by the time convolution and leaves no history in it: its frame counts as zero.
            pairs = self.time_conv(x, state).unflatten(1, (2, -1))
            x = torch.stack([pairs[:, 0], pairs[:, 1]], 3).flatten(2, 3)
        frames = x[0].transpose(0, 1)
        frames = frames.repeat_interleave(2, -1).repeat_interleave(2, -2)
        return self.resample["1"](frames).transpose(0, 1)[None]


class UpBlock(nn.Module):
    """Residual blocks and an upsampling, beside a shortcut that repeats channels into time and space.

    (vae2_2.py:Up_ResidualBlock, DupUp3D)
    """

    def __init__(
        self, channels: int, out: int, blocks: int, upsample: bool, temporal: bool, numerics: Numerics
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [ResidualBlock(channels if i == 0 else out, out, numerics) for i in range(blocks)]
        if upsample:
            layers.append(Resample(out, temporal, numerics))
        self.upsamples = nn.ModuleList(layers)
        self.out, self.upsample, self.time_factor = out, upsample, 2 if temporal else 1

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        straight = x
        for layer in self.upsamples:
            x = layer(x, state)
        return x + self.repeated(straight, state) if self.upsample else x

    def repeated(self, x: Tensor, state: StreamState) -> Tensor:
        x = x.repeat_interleave(self.out * self.time_factor * 4 // x.shape[1], 1)
        x = x.unflatten(1, (self.out, self.time_factor, 2, 2))  # [1, out, t, h, w, T, H, W]
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return x[:, :, self.time_factor - 1 :] if state.chunks == 0 else x


class Decoder(nn.Module):
    """One latent frame [1, 48, 1, h, w] -> [1, 12, T, 8h, 8w]: one frame for the stream's first chunk, then four."""

    def __init__(self, plan: "DecoderPlan", numerics: Numerics) -> None:
        super().__init__()
        width = plan.width
        self.conv1 = CausalConv3d(plan.latent_channels, width, (3, 3, 3), numerics)
        self.middle = nn.ModuleList(
            [
                ResidualBlock(width, width, numerics),
                AttentionBlock(width, numerics),
                ResidualBlock(width, width, numerics),
            ]
        )
        self.upsamples = nn.ModuleList(UpBlock(*stage, numerics) for stage in plan.stages)
        last = plan.stages[-1][1]
        self.head = nn.ModuleDict({"0": RMSNorm(last, 3), "2": CausalConv3d(last, 3 * PATCH**2, (3, 3, 3), numerics)})

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        x = self.conv1(x, state)
        for block in (*self.middle, *self.upsamples):
            x = block(x, state)
        return self.head["2"](F.silu(self.head["0"](x)), state)


@dataclass(frozen=True)
class DecoderPlan:
    """Widths of the decoder; a stage is (channels in, channels out, residual blocks, upsamples, doubles frames)."""

    latent_channels: int
    width: int
    stages: list[tuple[int, int, int, bool, bool]]

    @classmethod
    def from_shapes(cls, shapes: dict[str, tuple[int, ...]]) -> "DecoderPlan":
        """Read the structure off a state dict's shapes; raises ReferenceError when it is not this decoder's."""
        try:
            width, latent_channels = shapes["decoder.conv1.weight"][:2]
            stages = []
            while any(name.startswith(f"decoder.upsamples.{len(stages)}.") for name in shapes):
                root = f"decoder.upsamples.{len(stages)}.upsamples."
                indices = {int(name[len(root) :].split(".")[0]) for name in shapes if name.startswith(root)}
                upsample = f"{root}{max(indices)}.resample.1.weight" in shapes
                temporal = f"{root}{max(indices)}.time_conv.weight" in shapes
                out, channels = shapes[f"{root}0.residual.2.weight"][:2]
                stages.append((channels, out, len(indices) - upsample, upsample, temporal))
        except (KeyError, ValueError) as error:
            raise ReferenceError(f"the VAE's decoder is not Wan2.2's: {error} is missing or misshapen") from None
        if not stages or latent_channels != LATENT_CHANNELS:
            raise ReferenceError(
                f"the VAE's decoder is not Wan2.2's: it needs stages and {LATENT_CHANNELS} latent channels"
            )
        return cls(latent_channels, width, stages)
