"""Where every tap of a localization lies on the map: a panel of the model, a layer, a kind of tap within it."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

from parity.errors import ParityError
from parity.localize.findings import Localization
from parity.tensors.names import parse

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
WHOLE = "whole"

LAYERS, VISION, ENCODER, DECODER = "Language model", "Vision encoder", "VAE encoder", "VAE decoder"
_BLOCK = r"(?:conv1|head|(?:downsamples|upsamples|middle)\.\d+)(?:\.(?:downsamples|upsamples)\.\d+)?"
PLACES = (
    (LAYERS, re.compile(r"layers\.(\d+)(?:\.(.+))?")),
    (VISION, re.compile(r"vit_model\.blocks\.(\d+)(?:\.(.+))?")),
    (ENCODER, re.compile(rf"vae\.encoder\.({_BLOCK})(?:\.(.+))?")),
    (DECODER, re.compile(rf"vae\.decoder\.({_BLOCK})(?:\.(.+))?")),
)


@dataclass
class Panel:
    """A part of the model: rows are its layers, columns the kinds of taps within one, as (heading, what it means)."""

    name: str
    rows: list[str] = field(default_factory=list)
    columns: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Map:
    """The panels that have taps, the components around the layers, and where each component lies.

    `places` maps a component to (panel, row, column), or (-1, n, 0) for the n-th of `around`.
    """

    panels: list[Panel]
    around: list[str]
    places: dict[str, tuple[int, int, int]]


def lay_out(localization: Localization) -> Map:
    """Return the map of all components that a localization has taps, exact comparisons or findings of."""
    exact = (component_of(name) for name in localization.exact if not name.startswith("weights/"))
    found = [finding.component for finding in localization.findings]
    components = dict.fromkeys([*(c for c in exact if c), *(t.tap.component for t in localization.taps), *found])
    split = {component: place for component in components if (place := _split(component))}
    panels, places = [], {}
    for name, _ in PLACES:
        inside = {component: place[1:] for component, place in split.items() if place[0] == name}
        if not inside:
            continue
        rows = list(dict.fromkeys(row for row, _ in inside.values()))
        rows = sorted(rows, key=int) if name in (LAYERS, VISION) else _whole_last(rows)
        kinds = _ordered(name, dict.fromkeys(kind for _, kind in inside.values()))
        for component, (row, kind) in inside.items():
            places[component] = (len(panels), rows.index(row), kinds.index(kind))
        panels.append(Panel(name, [_short(row) for row in rows], [_heading(name, kind) for kind in kinds]))
    around = [component for component in components if component not in split]
    places |= {component: (-1, index, 0) for index, component in enumerate(around)}
    return Map(panels, around, places)


@cache
def component_of(name: str) -> str | None:
    """Return the component of a tap name, None for a name that no table describes."""
    try:
        return parse(name).component
    except ParityError:
        return None


def shade(ratio: float | None, wrong: bool) -> str:
    """Return the step of the colour scale: right or wrong, then by decades of error over floor; "none" unmeasured."""
    if wrong:
        # A wrong tap without a ratio has no floor to be measured by: shape, dtype or NaN.
        value = math.inf if ratio is None or math.isnan(ratio) else ratio
        return "wi" if math.isinf(value) else f"w{min(max(math.ceil(math.log10(max(value, 1.0))), 1), 5)}"
    if ratio is None or math.isnan(ratio):
        return "none"
    return "r0" if ratio <= 0.3 else "r1" if ratio <= 1 else "r2"


def _split(component: str) -> tuple[str, str, str] | None:
    for name, pattern in PLACES:
        match = pattern.fullmatch(component)
        if match:
            return name, match[1], match[2] or ""
    return None


def _ordered(panel: str, kinds: Iterable[str]) -> list[str]:
    known, seen = list(LAYER_KINDS), list(kinds)

    def place(kind: str) -> tuple[int, int, int, int]:
        if kind == "":
            return (2, 0, 0, 0)
        plain = kind.replace(EXPERT, "", 1)
        if panel == LAYERS and plain in known:
            return (0, known.index(plain), int(plain != kind), 0)
        return (1, 0, 0, seen.index(kind))

    return sorted(seen, key=place)


def _heading(panel: str, kind: str) -> tuple[str, str]:
    if kind == "":
        return WHOLE, "the output of the whole layer"
    plain = kind.replace(EXPERT, "", 1)
    # The VAE's heads number their parts.
    heading = LAYER_KINDS.get(plain, plain) if panel == LAYERS else f"part {plain}" if plain.isdigit() else plain
    return (heading, kind) if plain == kind else (f"{heading} · gen", f"{kind}, the expert of generated latents")


def _whole_last(rows: Sequence[str]) -> list[str]:
    """Return blocks in order of execution, a block that holds others after them."""
    order = {"conv1": 0, "downsamples": 1, "middle": 2, "upsamples": 3, "head": 4}

    def place(row: str) -> tuple[int, int, float]:
        parts = row.split(".")
        # The encoder's middle follows its blocks, the decoder's precedes them: both fall out of one order.
        return order[parts[0]], int(parts[1]) if len(parts) > 1 else 0, float(parts[3]) if len(parts) > 3 else math.inf

    return sorted(rows, key=place)


def _short(row: str) -> str:
    row = re.sub(r"(downsamples|upsamples)\.(\d+)\.(?:downsamples|upsamples)\.", r"\1.\2.", row)
    return row.replace("downsamples.", "down ").replace("upsamples.", "up ").replace("middle.", "middle ")
