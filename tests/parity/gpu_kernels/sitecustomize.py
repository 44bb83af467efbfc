"""Kernels of PyTorch as a GPU has them, for a process of upstream's that has none.

Products are summed in four parts from the last on, convolutions in two, in float32 whatever is given; attention takes
16 keys at a time, with a running maximum and weights that are rounded before they are normed. Python imports this by
itself where PYTHONPATH names its folder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PARTS, CONV_PARTS, KEYS = 4, 2, 16
_linear, _conv2d, _conv3d = F.linear, F.conv2d, F.conv3d


def _kept(x: Tensor) -> torch.dtype:
    """What PyTorch computes in there, under autocast or without it."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = _kept(x)
    with torch.autocast("cpu", enabled=False):
        parts = zip(*(each.to(dtype).float().tensor_split(PARTS, -1) for each in (x, weight)), strict=True)
        out = sum(_linear(*part) for part in reversed(list(parts)))
        return (out if bias is None else out + bias.to(dtype).float()).to(dtype)


def _in_parts(convolve):
    def convolution(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if groups != 1:
            return convolve(x, weight, bias, stride, padding, dilation, groups)
        dtype, channels = _kept(x), 1 - weight.dim()
        with torch.autocast("cpu", enabled=False):
            xs = x.to(dtype).float().tensor_split(CONV_PARTS, channels)
            weights = weight.to(dtype).float().tensor_split(CONV_PARTS, 1)
            parts = [convolve(*part, None, stride, padding, dilation) for part in zip(xs, weights, strict=True)]
            out = sum(reversed(parts))
            if bias is not None:
                out = out + bias.to(dtype).float().view(-1, *[1] * (weight.dim() - 2))
            return out.to(dtype)

    return convolution


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for x in (k, v))
    dtype = q.dtype
    with torch.autocast("cpu", enabled=False):
        scores = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            whole = attn_mask.dtype is torch.bool
            scores = scores.masked_fill(~attn_mask, float("-inf")) if whole else scores + attn_mask.float()
        largest = scores.new_full((*scores.shape[:-1], 1), -1e30)
        total, out = torch.zeros_like(largest), scores.new_zeros(*scores.shape[:-1], v.shape[-1])
        for part, values in zip(scores.split(KEYS, -1), v.float().split(KEYS, -2), strict=True):
            known, largest = largest, torch.maximum(largest, part.amax(-1, keepdim=True))
            weights, past = torch.exp(part - largest), torch.exp(known - largest)
            total = total * past + weights.sum(-1, keepdim=True)
            out = out * past + weights.to(dtype).float() @ values
        return (out / total).to(dtype)


F.linear, F.conv2d, F.conv3d, F.scaled_dot_product_attention = linear, _in_parts(_conv2d), _in_parts(_conv3d), attention
