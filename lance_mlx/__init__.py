"""ByteDance's Lance on MLX: `load` a checkpoint, then `denoise` and `decode` requests."""

from lance_mlx.errors import LanceError
from lance_mlx.numerics import BFLOAT16, FLOAT32, Numerics, policy
from lance_mlx.pipeline import Pipeline, load
from lance_mlx.request import Entry, Renorm, Request, Task

__all__ = [
    "BFLOAT16",
    "FLOAT32",
    "Entry",
    "LanceError",
    "Numerics",
    "Pipeline",
    "Renorm",
    "Request",
    "Task",
    "load",
    "policy",
]
