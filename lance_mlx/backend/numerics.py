"""Named numeric policies: which dtype the model computes in and where it rounds.

`float32` computes everything in float32. `bfloat16` rounds exactly where bytedance/Lance's launcher rounds, which casts
parameters and buffers alike with `.to(torch.bfloat16)`: the RoPE frequencies, the latent position table and the VAE's
per-channel mean and deviation are rounded too.
"""

from dataclasses import dataclass

import mlx.core as mx

from lance_mlx.errors import LanceError


@dataclass(frozen=True)
class Numerics:
    """A numeric policy.

    Attributes:
        name: `float32` or `bfloat16`; written into reports and file metadata.
        dtype: dtype of parameters, activations, latents and noise.
        round_rope_frequencies: whether the RoPE inverse frequencies are rounded to `dtype` before the angles are
        computed.
    """

    name: str
    dtype: mx.Dtype
    round_rope_frequencies: bool


FLOAT32 = Numerics("float32", mx.float32, round_rope_frequencies=False)
BFLOAT16 = Numerics("bfloat16", mx.bfloat16, round_rope_frequencies=True)

POLICIES = {policy.name: policy for policy in (FLOAT32, BFLOAT16)}


def policy(name: str) -> Numerics:
    """The policy of that name; raises LanceError for any other."""
    if name not in POLICIES:
        raise LanceError(f"unknown numerics '{name}': choose one of {', '.join(POLICIES)}")
    return POLICIES[name]


def runs_on_cpu() -> bool:
    """Whether MLX computes on its CPU backend, which materialises attention scores and has no fast bfloat16 product."""
    return mx.default_device().type == mx.cpu


def scaled(x: mx.array, factor: float) -> mx.array:
    """`x` times a scalar that is not rounded to the dtype of `x` first, as PyTorch multiplies; same shape and dtype."""
    return (x.astype(mx.float32) * factor).astype(x.dtype)
