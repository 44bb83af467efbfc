"""How the parts of Lance lie on a report's map: rows are layers or blocks, columns the kinds of taps within one."""

import math
import re
from collections.abc import Sequence

from parity.report.map import Part
from parity.tensors.names import TapName

# Kinds of taps within a decoder layer in order of execution, and what heads their column.
LAYER_KINDS = {
    "input_layernorm": "input norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.q_norm": "q norm",
    "self_attn.k_norm": "k norm",
    "self_attn.q_rope": "q rope",
    "self_attn.k_rope": "k rope",
    "self_attn.sdpa": "attention",
    "self_attn.o_proj": "o",
    "self_attn": "attn out",
    "post_attention_layernorm": "post norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
    "mlp": "mlp",
}
# Upstream calls the expert of generated latents moe_gen; its taps stand right of the other expert's.
EXPERT = "_moe_gen"
_BLOCK = r"(?:conv1|head|(?:downsamples|upsamples|middle)\.\d+)(?:\.(?:downsamples|upsamples)\.\d+)?"
_BLOCKS = {"conv1": 0, "downsamples": 1, "middle": 2, "upsamples": 3, "head": 4}


def _numbered(row: str) -> tuple[int, ...]:
    return (int(row),)


def _block(row: str) -> tuple[int, int, float]:
    """Blocks in order of execution, one that holds others after them."""
    parts = row.split(".")
    # The encoder's middle follows its blocks, the decoder's precedes them: both fall out of one order.
    return _BLOCKS[parts[0]], int(parts[1]) if len(parts) > 1 else 0, float(parts[3]) if len(parts) > 3 else math.inf


def _short(row: str) -> str:
    row = re.sub(r"(downsamples|upsamples)\.(\d+)\.(?:downsamples|upsamples)\.", r"\1.\2.", row)
    return row.replace("downsamples.", "down ").replace("upsamples.", "up ").replace("middle.", "middle ")


def _layer_kind(kind: str) -> tuple[int, ...]:
    plain, known = kind.replace(EXPERT, "", 1), list(LAYER_KINDS)
    return (0, known.index(plain), int(plain != kind)) if plain in known else (1,)


def _layer_heading(kind: str) -> tuple[str, str]:
    plain = kind.replace(EXPERT, "", 1)
    heading = LAYER_KINDS.get(plain, plain)
    return (heading, kind) if plain == kind else (f"{heading} · gen", f"{kind}, the expert of generated latents")


def _block_heading(kind: str) -> tuple[str, str]:
    # The VAE's heads number their parts.
    return (f"part {kind}" if kind.isdigit() else kind), kind


PARTS: Sequence[Part] = (
    Part("Language model", re.compile(r"layers\.(\d+)(?:\.(.+))?"), _numbered, str, _layer_kind, _layer_heading),
    Part("Vision encoder", re.compile(r"vit_model\.blocks\.(\d+)(?:\.(.+))?"), _numbered),
    Part("VAE encoder", re.compile(rf"vae\.encoder\.({_BLOCK})(?:\.(.+))?"), _block, _short, heading=_block_heading),
    Part("VAE decoder", re.compile(rf"vae\.decoder\.({_BLOCK})(?:\.(.+))?"), _block, _short, heading=_block_heading),
)
ARMS = {"cond": "conditional", "uncond": "unconditional"}


def arm_of(tap: TapName) -> str:
    """The guidance arm of a tap or an exact array; what is of none is the conditional one's, where the other has its
    own."""
    return tap.arm or ("uncond" if tap.name.endswith(".uncond") else "cond")


def axes_within(component: str, dimensions: int) -> list[str]:
    """The names of the axes of a tap of which the table of taps names none: within the VAE's coders all have one of two
    layouts."""
    if not component.startswith("vae."):
        return []
    return {5: "1 channel t h w".split(), 4: "t channel h w".split()}.get(dimensions, [])
