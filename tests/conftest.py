"""What every process that runs tests loads first: PyTorch, then lance_mlx, which finds MLX an OpenBLAS."""

# In this order: PyTorch would multiply with an OpenBLAS that is there before it, and no longer bit for bit as when
# upstream was captured.
import torch  # noqa: F401
from hypothesis import HealthCheck, settings

import lance_mlx  # noqa: F401

# A busy machine may take any time over an example.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
