"""ByteDance's Lance on MLX: `load` a checkpoint, then `generate` from requests and `answer` questions."""

from lance_mlx.api import Answer, Generated, LanceModel, load
from lance_mlx.errors import LanceError
from lance_mlx.numerics import BFLOAT16, FLOAT32, Numerics, policy
from lance_mlx.request import Entry, Question, Renorm, Request, Task, Variant, Visual, VisualKind
from lance_mlx.weights import ViTSource

__all__ = [
    "BFLOAT16",
    "FLOAT32",
    "Answer",
    "Entry",
    "Generated",
    "LanceError",
    "LanceModel",
    "Numerics",
    "Question",
    "Renorm",
    "Request",
    "Task",
    "Variant",
    "ViTSource",
    "Visual",
    "VisualKind",
    "load",
    "policy",
]
