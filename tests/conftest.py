"""What every process that runs tests loads first: PyTorch, then lance_mlx, which finds MLX an OpenBLAS."""

# In this order: PyTorch would multiply with an OpenBLAS that is there before it, and no longer bit for bit as when
# upstream was captured.
import torch  # noqa: F401

import lance_mlx  # noqa: F401
