"""What the numbers and texts of a request may be, and why no more."""

from typing import NamedTuple

from lance_mlx.errors import LanceError

VISUAL_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
MAX_TOKENS = 32768
"""Tokens that Qwen2.5-VL was trained on at once; a character may be one."""
_LARGEST_SIDE = 4096


class Limit(NamedTuple):
    """Least and most that a number may be, and why no more."""

    least: int
    most: int
    why: str


LIMITS = {
    "num_steps": Limit(1, 1000, "a step of more would move bfloat16 latents by less than their rounding"),
    "fps": Limit(1, 240, "no player shows more"),
    "vae_resolution": Limit(16, _LARGEST_SIDE, f"a source has at most {_LARGEST_SIDE} pixels a side"),
    "vit_resolution": Limit(28, _LARGEST_SIDE, f"a source has at most {_LARGEST_SIDE} pixels a side"),
    "max_new_tokens": Limit(1, MAX_TOKENS, "the language model was trained on no longer texts"),
    "seed": Limit(0, 2**64 - 1, "MLX's generator takes 64 bits"),
}


def check_number(name: str, value: int) -> None:
    """Raise LanceError for a number out of its limits."""
    least, most, why = LIMITS[name]
    if value < least:
        raise LanceError(f"{name} {value} must be at least {least}")
    if value > most:
        raise LanceError(f"{name} {value} must be at most {most}: {why}")


def check_text(name: str, text: str) -> None:
    """Raise LanceError for a text that is too long, is no Unicode, or holds a token that stands for pixels."""
    if len(text) > MAX_TOKENS:
        most = f"at most {MAX_TOKENS:,}, the tokens that the language model was trained on: shorten it"
        raise LanceError(f"the {name} has {len(text):,} characters and may have {most}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise LanceError(f"the {name} is not valid Unicode: write it as UTF-8") from None
    for token in VISUAL_TOKENS:
        if token in text:
            raise LanceError(f"the {name} contains the control token {token}, which stands for pixels: remove it")
