"""Wan2.2's VAE encoder: one frame, then four at a time, with explicit stream state.

Shapes: [1, C, T, H, W]. Structure and widths are read from the shapes in the state dict.
"""

from dataclasses import dataclass

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


class Downsample(nn.Module):
    """Half the rows and columns, and with a time convolution half the frames of all but the stream's first chunk.

    (vae2_2.py:Resample)
    """

    def __init__(self, channels: int, temporal: bool, numerics: Numerics) -> None:
        super().__init__()
        # Index 0 pads on the right and below, the only sides that a stride of two leaves short.
        self.resample = nn.ModuleDict({"1": Conv2d(channels, channels, 3, numerics, stride=2, padding=0)})
        self.time_conv = (
            CausalConv3d(channels, channels, (3, 1, 1), numerics, time_stride=2, history=1) if temporal else None
        )

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        frames = F.pad(x[0].transpose(0, 1), (0, 1, 0, 1))
        x = self.resample["1"](frames).transpose(0, 1)[None]
        if self.time_conv is None:
            return x
        if state.chunks == 0:
            state.history[self.time_conv] = x  # the first frame passes by the time convolution
            return x
        return self.time_conv(x, state)


class DownBlock(nn.Module):
    """Residual blocks and a downsampling, beside a shortcut that averages time, space and channels into channels.

    (vae2_2.py:Down_ResidualBlock, AvgDown3D)
    """

    def __init__(
        self, channels: int, out: int, blocks: int, downsample: bool, temporal: bool, numerics: Numerics
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [ResidualBlock(channels if i == 0 else out, out, numerics) for i in range(blocks)]
        if downsample:
            layers.append(Downsample(out, temporal, numerics))
        self.downsamples = nn.ModuleList(layers)
        self.out, self.time_factor, self.space_factor = out, 2 if temporal else 1, 2 if downsample else 1

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        straight = x
        for layer in self.downsamples:
            x = layer(x, state)
        return x + self.averaged(straight)

    def averaged(self, x: Tensor) -> Tensor:
        time, space = self.time_factor, self.space_factor
        # A first chunk of one frame is paired with a zero frame before it.
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % time, 0))
        x = x.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time))
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)  # [1, C * time * space * space, T, H, W]
        return x.unflatten(1, (self.out, -1)).mean(2)


@dataclass(frozen=True)
class EncoderPlan:
    """Widths of the encoder; a stage is (channels in, channels out, residual blocks, downsamples, halves frames)."""

    width: int
    stages: list[tuple[int, int, int, bool, bool]]

    @classmethod
    def from_shapes(cls, shapes: dict[str, tuple[int, ...]]) -> "EncoderPlan":
        """Read the structure off a state dict's shapes; raises ReferenceError when it is not this encoder's."""
        try:
            width = shapes["encoder.conv1.weight"][0]
            stages = []
            while any(name.startswith(f"encoder.downsamples.{len(stages)}.") for name in shapes):
                root = f"encoder.downsamples.{len(stages)}.downsamples."
                last = max(int(name[len(root) :].split(".")[0]) for name in shapes if name.startswith(root))
                downsample = f"{root}{last}.resample.1.weight" in shapes
                temporal = f"{root}{last}.time_conv.weight" in shapes
                out, channels = shapes[f"{root}0.residual.2.weight"][:2]
                stages.append((channels, out, last + 1 - downsample, downsample, temporal))
        except (KeyError, ValueError) as error:
            raise ReferenceError(f"the VAE's encoder is not Wan2.2's: {error} is missing or misshapen") from None
        if not stages:
            raise ReferenceError("the VAE's encoder is not Wan2.2's: it has no stages")
        return cls(width, stages)


class Encoder(nn.Module):
    """Packed pixels [1, 12, T, 8h, 8w] -> [1, 96, 1, h, w]: one frame for the stream's first chunk, then four."""

    def __init__(self, plan: EncoderPlan, numerics: Numerics) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(3 * PATCH**2, plan.width, (3, 3, 3), numerics)
        self.downsamples = nn.ModuleList(DownBlock(*stage, numerics) for stage in plan.stages)
        width = plan.stages[-1][1]
        self.middle = nn.ModuleList(
            [
                ResidualBlock(width, width, numerics),
                AttentionBlock(width, numerics),
                ResidualBlock(width, width, numerics),
            ]
        )
        self.head = nn.ModuleDict(
            {"0": RMSNorm(width, 3), "2": CausalConv3d(width, 2 * LATENT_CHANNELS, (3, 3, 3), numerics)}
        )

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        x = self.conv1(x, state)
        for block in (*self.downsamples, *self.middle):
            x = block(x, state)
        return self.head["2"](F.silu(self.head["0"](x)), state)
