"""Parity of lance_mlx and reference with tensors captured from bytedance/Lance."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

# PyTorch first: lance_mlx loads an OpenBLAS for MLX, with which PyTorch would round otherwise than by itself.
import torch  # noqa: F401

# The process that runs a clone of upstream may have neither lance_mlx nor MLX, and needs none.
with suppress(ModuleNotFoundError):
    import lance_mlx  # noqa: F401

if TYPE_CHECKING:
    from parity.api import assert_agrees, compare
    from parity.comparison.compare import Comparison
    from parity.errors import ParityError

__all__ = ["Comparison", "ParityError", "assert_agrees", "compare"]

_PLACES = {"Comparison": "comparison.compare", "ParityError": "errors"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: MLX, pandas and the rest take a second."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES.get(name, 'api')}"), name)
