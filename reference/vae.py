"""Wan2.2's video autoencoder, the decoder half: one latent frame at a time, with explicit stream state.

Shapes: [1, C, T, H, W]. Structure and widths are read from the shapes in the state dict.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.errors import ReferenceError
from reference.numerics import Numerics, attend

HISTORY = 2
PATCH = 2
# Per-channel mean and deviation of the latents (bytedance/Lance modeling/vae/wan/vae2_2.py:Wan2_2_VAE).
MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
    *(0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723),
    *(-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
DEVIATION = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
    *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
    *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)
LATENT_CHANNELS = len(MEAN)


@dataclass
class StreamState:
    """What a decoding stream remembers: the last two input frames of every causal convolution, and its chunk count."""

    chunks: int = 0
    history: dict[nn.Module, Tensor] = field(default_factory=dict)


def convolve(x: Tensor, layer: nn.Conv2d | nn.Conv3d, padding: int | tuple[int, ...], numerics: Numerics) -> Tensor:
    """Convolution in the policy's multiplying dtype, answered in its dtype."""
    wide = numerics.multiply_dtype
    function = F.conv3d if layer.weight.ndim == 5 else F.conv2d
    out = function(x.to(wide), layer.weight.to(wide), layer.bias.to(wide), padding=padding)
    return out.to(numerics.torch_dtype)


class CausalConv3d(nn.Conv3d):
    """Convolution that sees only the present and the past: frames before the stream's first count as zero."""

    def __init__(self, channels: int, out: int, kernel: tuple[int, int, int], numerics: Numerics) -> None:
        super().__init__(channels, out, kernel)
        self.numerics = numerics

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        frames, rows, columns = self.kernel_size
        if frames > 1:
            past = state.history.get(self)
            seen = x if past is None else torch.cat([past, x], 2)
            state.history[self] = seen[:, :, -HISTORY:]
            x = F.pad(seen, (0, 0, 0, 0, frames - 1 - (0 if past is None else past.shape[2]), 0))
        return convolve(x, self, (0, rows // 2, columns // 2), self.numerics)


class Conv2d(nn.Conv2d):
    """Convolution of every frame by itself, [T, C, H, W], size kept."""

    def __init__(self, channels: int, out: int, kernel: int, numerics: Numerics) -> None:
        super().__init__(channels, out, kernel)
        self.numerics = numerics

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self, self.kernel_size[0] // 2, self.numerics)


class RMSNorm(nn.Module):
    """Unit length over the channels, times sqrt(channels), times gamma (vae2_2.py:RMS_norm)."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, *[1] * axes))
        self.scale = channels**0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.scale * self.gamma


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, with a shortcut."""

    def __init__(self, channels: int, out: int, numerics: Numerics) -> None:
        super().__init__()
        # Indices 1, 4 and 5 hold weightless layers: the checkpoint counts them.
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(channels, 3),
                "2": CausalConv3d(channels, out, (3, 3, 3), numerics),
                "3": RMSNorm(out, 3),
                "6": CausalConv3d(out, out, (3, 3, 3), numerics),
            }
        )
        self.shortcut = CausalConv3d(channels, out, (1, 1, 1), numerics) if channels != out else None

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        straight = x if self.shortcut is None else self.shortcut(x, state)
        x = self.residual["2"](F.silu(self.residual["0"](x)), state)
        x = self.residual["6"](F.silu(self.residual["3"](x)), state)
        return x + straight


class AttentionBlock(nn.Module):
    """Single-head attention among the cells of each frame."""

    def __init__(self, channels: int, numerics: Numerics) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = Conv2d(channels, 3 * channels, 1, numerics)
        self.proj = Conv2d(channels, channels, 1, numerics)
        self.kind = numerics.attention

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        frames = x[0].transpose(0, 1)  # [T, C, H, W]
        cells = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).contiguous().unflatten(2, (3, 1, -1))
        # One query, key and value a cell, [cells, 1, C] each.
        seen = [attend(*frame.unbind(1), None, self.kind)[:, 0].transpose(0, 1) for frame in cells]
        return self.proj(torch.stack(seen).reshape(frames.shape)).transpose(0, 1)[None] + x


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


class VAE(nn.Module):
    """Decoder of latents; `conv2` and `decoder` are named as in Wan2.2_VAE.pth."""

    def __init__(self, plan: DecoderPlan, numerics: Numerics) -> None:
        super().__init__()
        self.numerics = numerics
        self.conv2 = CausalConv3d(plan.latent_channels, plan.latent_channels, (1, 1, 1), numerics)
        self.decoder = Decoder(plan, numerics)

    @torch.inference_mode()
    def decode_frames(self, latent: Tensor) -> Iterator[Tensor]:
        """Decode a latent [t, h, w, 48]: one chunk of pixels [3, T, 16h, 16w] a latent frame, float32 in [-1, 1].

        The first chunk is one frame, the others four (vae2_2.py:WanVAE_.decode). Frames to come never matter.
        """
        dtype = self.numerics.torch_dtype
        mean, deviation = (torch.tensor(x, dtype=dtype, device=latent.device) for x in (MEAN, DEVIATION))
        # Upstream keeps the deviation's reciprocal and divides by it: two roundings in bfloat16.
        z = latent.to(dtype) / (1.0 / deviation) + mean
        state = StreamState()
        for frame in z.movedim(-1, 0)[None].split(1, 2):
            patches = self.decoder(self.conv2(frame, state), state)[0]
            state.chunks += 1
            pixels = patches.unflatten(0, (3, PATCH, PATCH))  # [3, column, row, T, H, W]
            pixels = pixels.permute(0, 3, 4, 2, 5, 1).flatten(4, 5).flatten(2, 3)
            yield pixels.float().clamp(-1, 1)
