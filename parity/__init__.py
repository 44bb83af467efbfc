"""Parity of lance_mlx and reference with tensors captured from bytedance/Lance."""

import sys
from contextlib import suppress
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity.api import assert_agrees, compare
    from parity.comparison.compare import Comparison
    from parity.errors import ParityError
    from parity.pairs import Pair, assert_pair_agrees, localize_pair

__all__ = ["Comparison", "Pair", "ParityError", "assert_agrees", "assert_pair_agrees", "compare", "localize_pair"]

_PLACES = {"Comparison": "comparison.compare", "Pair": "pairs", "ParityError": "errors",
           "assert_pair_agrees": "pairs", "localize_pair": "pairs"}  # fmt: skip


class _InOrder(MetaPathFinder):
    """Imports PyTorch before lance_mlx, and that before MLX, when one of them is first asked for.

    lance_mlx loads an OpenBLAS for MLX, with which PyTorch would round otherwise than by itself.
    """

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in ("lance_mlx", "mlx"):
            import torch  # noqa: F401
        if name == "mlx":
            # Whoever looks whether there is an MLX, as transformers does, asks too where there is no lance_mlx.
            with suppress(ModuleNotFoundError):
                import lance_mlx  # noqa: F401


sys.meta_path.insert(0, _InOrder())


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: MLX, pandas and the rest take a second."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES.get(name, 'api')}"), name)
