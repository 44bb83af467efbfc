"""Sizes by aspect ratio, as upstream's demo offers them (bytedance/Lance common/gradio_utils/settings.py)."""

import math

from lance_mlx.config import MAX_LATENT_SIDE, SPATIAL_STRIDE

ASPECTS = ("21:9", "16:9", "3:2", "4:3", "1:1", "3:4", "2:3", "9:16")


def size_of(aspect: str, resolution: int) -> tuple[int, int]:
    """Width and height, multiples of 16 up to 1024, of about `resolution`^2 pixels at an aspect such as "16:9"."""
    wide, high = map(int, aspect.split(":"))
    # A long side stops at the end of the position table, and the short one with it.
    scale = min(resolution / math.sqrt(wide * high), MAX_LATENT_SIDE * SPATIAL_STRIDE / max(wide, high))
    width, height = (max(round(side * scale / SPATIAL_STRIDE), 1) * SPATIAL_STRIDE for side in (wide, high))
    return width, height
