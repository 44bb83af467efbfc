"""What the encoder and the decoder of Wan2.2's VAE are made of; shapes [1, C, T, H, W] where nothing else is said."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.numerics import Numerics, attend

LATENT_CHANNELS = 48
PATCH = 2


@dataclass
class StreamState:
    """What a stream remembers: the last input frames of every causal convolution, and its chunk count."""

    chunks: int = 0
    history: dict[nn.Module, Tensor] = field(default_factory=dict)


def convolve(
    x: Tensor,
    layer: nn.Conv2d | nn.Conv3d,
    padding: int | tuple[int, ...],
    stride: int | tuple[int, ...],
    numerics: Numerics,
) -> Tensor:
    """Convolution in the policy's multiplying dtype, answered in its dtype."""
    wide = numerics.multiply_dtype
    function = F.conv3d if layer.weight.ndim == 5 else F.conv2d
    bias = None if layer.bias is None else layer.bias.to(wide)
    product = function(x.to(wide), layer.weight.to(wide), bias, stride, padding)
    return numerics.rounded(product, layer.weight[0].numel())


class CausalConv3d(nn.Conv3d):
    """Convolution that sees only the present and the past: frames before the stream's first count as zero.

    `history` is the number of frames that the next chunk needs, fewer than the kernel's where a stride skips some.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: tuple[int, int, int],
        numerics: Numerics,
        time_stride: int = 1,
        history: int = 2,
    ) -> None:
        super().__init__(channels, out, kernel, stride=(time_stride, 1, 1))
        self.numerics, self.history = numerics, history

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        frames, rows, columns = self.kernel_size
        if frames > 1:
            past = state.history.get(self)
            seen = x if past is None else torch.cat([past, x], 2)
            state.history[self] = seen[:, :, -self.history :]
            x = F.pad(seen, (0, 0, 0, 0, self.history - (0 if past is None else past.shape[2]), 0))
        return convolve(x, self, (0, rows // 2, columns // 2), self.stride, self.numerics)


class Conv2d(nn.Conv2d):
    """Convolution of every frame by itself, [T, C, H, W]; the size is kept unless stride and padding say otherwise."""

    def __init__(
        self, channels: int, out: int, kernel: int, numerics: Numerics, stride: int = 1, padding: int | None = None
    ) -> None:
        super().__init__(channels, out, kernel, stride, kernel // 2 if padding is None else padding)
        self.numerics = numerics

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self, self.padding, self.stride, self.numerics)


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
        self.kind, self.draw = numerics.attention, numerics.draw

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        frames = x[0].transpose(0, 1)  # [T, C, H, W]
        cells = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).contiguous().unflatten(2, (3, 1, -1))
        # One query, key and value a cell, [cells, 1, C] each.
        seen = [attend(*frame.unbind(1), None, self.kind, self.draw)[:, 0].transpose(0, 1) for frame in cells]
        return self.proj(torch.stack(seen).reshape(frames.shape)).transpose(0, 1)[None] + x


def pack(pixels: Tensor) -> Tensor:
    """Pixels [1, 3, T, H, W] -> [1, 12, T, H / 2, W / 2]: each 2x2 patch becomes channels (vae2_2.py:patchify)."""
    x = pixels.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # [1, 3, T, H / 2, row, W / 2, column]
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpack(patches: Tensor) -> Tensor:
    """Inverse of pack (vae2_2.py:unpatchify)."""
    x = patches.unflatten(1, (-1, PATCH, PATCH))  # [1, 3, column, row, T, H, W]
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
