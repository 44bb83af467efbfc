"""ByteDance's Lance on MLX: `load` a checkpoint, then `generate` from requests and `answer` questions."""

from typing import TYPE_CHECKING, Any

from lance_mlx.backend import allocator, blas, precision

# Before anything imports MLX.
blas.load()
allocator.keep_freed()
precision.keep_float32()

if TYPE_CHECKING:
    from lance_mlx.api import LanceModel, load
    from lance_mlx.backend.numerics import BFLOAT16, FLOAT32, Numerics, policy
    from lance_mlx.checkpoint.tensors import ViTSource
    from lance_mlx.errors import LanceError
    from lance_mlx.outputs import Answer, Generated
    from lance_mlx.requests.request import (
        Entry,
        Question,
        Renorm,
        Request,
        Scheduler,
        Task,
        Variant,
        Visual,
        VisualKind,
    )

_PLACES = {
    "api": ("LanceModel", "load"),
    "outputs": ("Answer", "Generated"),
    "checkpoint.tensors": ("ViTSource",),
    "errors": ("LanceError",),
    "backend.numerics": ("BFLOAT16", "FLOAT32", "Numerics", "policy"),
    "requests.request": (
        "Entry",
        "Question",
        "Renorm",
        "Request",
        "Scheduler",
        "Task",
        "Variant",
        "Visual",
        "VisualKind",
    ),
}
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
    "Scheduler",
    "Task",
    "Variant",
    "ViTSource",
    "Visual",
    "VisualKind",
    "load",
    "policy",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the libraries for media and tokenizing take a while."""
    place = next((module for module, names in _PLACES.items() if name in names), None)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{place}"), name)
