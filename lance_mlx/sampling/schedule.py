"""Timesteps of the flow sampler."""

import numpy as np


def timesteps(num_steps: int, shift: float) -> np.ndarray:
    """Times from 1 (noise) to 0 (data), float32 [num_steps + 1]: shift*u / (1 + (shift-1)*u) for evenly spaced u.

    The same float32 bits as upstream's `torch.linspace` on a CPU, which counts from both ends towards the middle and
    fuses multiply and add into one rounding: float64 holds the exact sum, so rounding it once does the same.
    """
    step = np.float64(np.float32(-1) / np.float32(num_steps))
    index = np.arange(num_steps + 1)
    u = np.where(index < (num_steps + 1) // 2, 1 + step * index, 0 - step * (num_steps - index)).astype(np.float32)
    return np.float32(shift) * u / (np.float32(1) + np.float32(shift - 1) * u)
