"""Qwen2.5-VL's vision tower, as upstream runs it.

Shapes: n patches (all visuals of a sample after one another), h heads, d head_dim. A visual's grid is (t, h, w) in
patches; its patches come in groups of 2x2, and every fourth of them becomes a token.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.config import VisionConfig
from reference.errors import ReferenceError
from reference.mot import MLP, RMSNorm, Rope
from reference.numerics import Linear, Numerics, attend, widened

NORM_EPS = 1e-6
ROPE_THETA = 10000.0
Thw = tuple[int, int, int]


class PatchEmbed(nn.Module):
    """Flattened patches [n, 3 * temporal * patch * patch] -> [n, hidden]: a convolution of one step, without bias."""

    def __init__(self, config: VisionConfig, numerics: Numerics) -> None:
        super().__init__()
        self.kernel = (3, config.temporal_patch_size, config.patch_size, config.patch_size)
        self.numerics = numerics
        self.proj = nn.Conv3d(3, config.hidden_size, self.kernel[1:], self.kernel[1:], bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        wide, dtype = self.numerics.multiply_dtype, self.numerics.torch_dtype
        x = patches.to(dtype).to(wide).view(-1, *self.kernel)
        product = F.conv3d(x, self.proj.weight.to(wide), stride=self.kernel[1:]).flatten(1)
        return self.numerics.rounded(product, self.proj.weight[0].numel())


class Attention(nn.Module):
    """Attention within the runs of patches that a mask bool [n, n] joins (Qwen2_5_VLVisionSdpaAttention)."""

    def __init__(self, config: VisionConfig, numerics: Numerics) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, True, numerics)
        self.proj = Linear(config.hidden_size, config.hidden_size, True, numerics)
        self.q_rope, self.k_rope = Rope(), Rope()
        # Upstream's query has no batch axis, for which PyTorch rounds only the result.
        self.kind, self.draw = numerics.attention.replace("sdpa", "math"), numerics.draw

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)
        # Rotated in float32 whatever the weights' dtype.
        q, k = (rope(widened(y), cos, sin).to(v.dtype) for rope, y in ((self.q_rope, q), (self.k_rope, k)))
        return self.proj(attend(q, k, v, mask, self.kind, self.draw).flatten(1))


class Block(nn.Module):
    """Norm, attention, norm, feed-forward, each with a residual."""

    def __init__(self, config: VisionConfig, numerics: Numerics) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, NORM_EPS)
        self.norm2 = RMSNorm(config.hidden_size, NORM_EPS)
        self.attn = Attention(config, numerics)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, True, numerics)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), mask, cos, sin)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Four neighbouring patches, normed one by one, become a token [n / 4, out_hidden]."""

    def __init__(self, config: VisionConfig, numerics: Numerics) -> None:
        super().__init__()
        self.wide = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, NORM_EPS)
        first = Linear(self.wide, self.wide, True, numerics)
        self.mlp = nn.Sequential(first, nn.GELU(), Linear(self.wide, config.out_hidden_size, True, numerics))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.wide))


class VisionTower(nn.Module):
    """The tower (bytedance/Lance modeling/vit/qwen2_5_vl_vit.py:Qwen2_5_VisionTransformerPretrainedModel).

    The blocks run over windows: all patches of a window are neighbours in the sequence, and the merged tokens go back
    to reading order at the end. In most blocks a patch sees its window, in a few its whole frame.
    """

    def __init__(self, config: VisionConfig, numerics: Numerics) -> None:
        super().__init__()
        self.config, self.numerics = config, numerics
        self.patch_embed = PatchEmbed(config, numerics)
        self.blocks = nn.ModuleList(Block(config, numerics) for _ in range(config.depth))
        self.merger = Merger(config, numerics)

    @torch.inference_mode()
    def forward(self, patches: Tensor, grids: Sequence[Thw]) -> Tensor:
        """patches float [n, 1176] of all visuals, their grids -> tokens [n / 4, out_hidden] in reading order."""
        group = self.config.spatial_merge_size**2
        if len(patches) != sum(t * h * w for t, h, w in grids):
            raise ReferenceError(f"{len(patches)} patches do not fill the grids {list(grids)}")
        tokens, windows, frames = self.windows(grids, patches.device)

        def gathered(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, group))[tokens].flatten(0, 1)

        x = gathered(self.patch_embed(patches))
        cos, sin = (gathered(y) for y in self.rotation(grids, patches.device))
        windows, frames = (ids.repeat_interleave(group) for ids in (windows, frames))
        masks = {kind: ids[:, None] == ids[None] for kind, ids in ((False, windows), (True, frames))}
        for index, block in enumerate(self.blocks):
            x = block(x, masks[index in self.config.fullatt_block_indexes], cos, sin)
        return self.merger(x)[torch.argsort(tokens)]

    def windows(self, grids: Sequence[Thw], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Order of the tokens by window, and for each in that order the ids of its window and of its frame.

        Windows are squares of `window_size` pixels, cut off at the right and below (get_window_index).
        """
        config = self.config
        side = config.window_size // config.spatial_merge_size // config.patch_size
        keys = []
        for visual, (t, h, w) in enumerate(grids):
            rows, columns = h // config.spatial_merge_size, w // config.spatial_merge_size
            frame, row, column = torch.meshgrid(*(torch.arange(n) for n in (t, rows, columns)), indexing="ij")
            places = (torch.full_like(frame, visual), frame, row // side, column // side)
            keys.append(torch.stack(places).flatten(1))
        key = torch.cat(keys, 1)
        _, window = torch.unique(key, dim=1, return_inverse=True)
        _, frame = torch.unique(key[:2], dim=1, return_inverse=True)
        # Windows are numbered in the order of visual, frame, row, column; within one, tokens keep the reading order.
        tokens = torch.argsort(window, stable=True)
        return tuple(x.to(device) for x in (tokens, window[tokens], frame[tokens]))

    def rotation(self, grids: Sequence[Thw], device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [n, d] of the patches in input order: half of the frequencies turn by row, half by column.

        In bfloat16 the frequencies, the angles, the cosines and the sines are each rounded (rot_pos_emb).
        """
        config, dtype = self.config, self.numerics.torch_dtype
        d = config.hidden_size // config.num_heads
        merge = config.spatial_merge_size
        exponents = torch.arange(0, d // 2, 2, device=device).float() / (d // 2)
        frequencies = (1.0 / ROPE_THETA**exponents).to(dtype)
        parts = []
        for t, h, w in grids:
            places = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1)
            # Patches come token by token.
            places = places.unflatten(1, (-1, merge)).unflatten(0, (-1, merge)).transpose(1, 2).reshape(-1, 2)
            parts.append(places.repeat(t, 1))
        places = torch.cat(parts).to(device, dtype)
        angles = (places[:, :, None] * frequencies).flatten(1)
        angles = torch.cat([angles, angles], 1)
        return angles.cos(), angles.sin()
