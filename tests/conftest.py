"""PyTorch before lance_mlx, in every process that runs tests."""

# lance_mlx loads an OpenBLAS for MLX. Where PyTorch comes after it, it multiplies with it too, and no longer bit for
# bit as when upstream was captured.
import torch  # noqa: F401
