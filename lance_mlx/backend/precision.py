"""Whether MLX multiplies float32 numbers as such.

Where a GPU has units for it (NVIDIA's since Ampere, Apple's since the M5), MLX multiplies float32 in TF32 unless the
environment says otherwise: ten bits of each factor, a relative error of 3e-4 in a product. The float32 policy has no
rounding of its own, so it needs all 23.
"""

import os

VARIABLE = "MLX_ENABLE_TF32"
"""MLX's environment variable; it is read at MLX's first product and never again."""
_FACTOR = 1 + 2**-12
"""More bits than TF32 holds."""


def keep_float32() -> None:
    """Have MLX multiply float32 in float32, unless the environment decides."""
    os.environ.setdefault(VARIABLE, "0")


def multiplies_float32() -> bool:
    """Whether it does so, found by a product."""
    # This file is imported before MLX may be.
    import mlx.core as mx

    factors = mx.full((64, 64), _FACTOR)
    return mx.array_equal(factors @ mx.eye(64), factors).item()


def describe() -> str:
    """Say in words how float32 is multiplied, and how to change it."""
    if multiplies_float32():
        return "in float32"
    chosen = os.environ.get(VARIABLE)
    if chosen != "0":
        return f"in TF32, of 10 bits: {VARIABLE} is {chosen}; 0 keeps float32"
    return "in TF32, of 10 bits: something multiplied with MLX before lance_mlx was imported"
