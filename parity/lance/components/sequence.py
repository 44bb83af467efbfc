"""The integers of a sequence: token ids, roles, splits, grids and rotary positions, with the names of their parts."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from parity.hypotheses.base import DoesNotApply
from parity.lance.components.base import Known
from parity.lance.hypotheses.counting import columns
from parity.lance.hypotheses.drafts import encoded, user_text
from parity.lance.hypotheses.tokens import GEN, LATENTS, arm_splits, call_rows
from parity.laws.segments import CELLS, CLOSING, OPENING, TEXT, Segment
from reference.layout import Mode, Role, Split
from reference.prompt import template

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

Read = tuple[dict[str, np.ndarray], dict[str, Any]]
BLOCKS = {
    Role.VIT: "the ViT block",
    Role.SOURCE: "the source",
    Role.SUBJECT: "the subject",
    Role.NOISE: "the target",
    Role.TEXT: "the user's text",
    Role.TEMPLATE: "the template's part",
}
FIELDS = {"text_ids": "ids", "modality": "roles", "split_lens": "lengths", "attn_modes": "modes", "answer": "answer"}
CALLED = {"ids": "token ids", "roles": "roles", "lengths": "lengths", "modes": "ways of attending", "answer": "starts"}
NAMES = {
    "ids": {},
    "roles": {role.value: f"{role.value} ({role.name.lower()})" for role in Role},
    "modes": {mode.value: f"{mode.value} ({mode.name.lower().replace('_', ' ')})" for mode in Mode},
}
POSITIONS = ("frame positions", "row positions", "column positions")


def segments(site: "TapProbe", arm: str) -> list[Segment]:
    """The parts of an arm's sequence; a split keeps its place in the conditional arm's."""
    splits = arm_splits(site, arm)
    places = {split.start: place for place, split in enumerate(site.layout.splits)}
    found: list[Segment] = []
    start = 0
    for split in splits:
        name, place = _name(site, split), places[split.start]
        for part in _parts(site, split, name):
            order = 10 * place + sum(segment.split == place for segment in found)
            moved = replace(part, order=order, split=place, start=start + part.start, stop=start + part.stop)
            found.append(moved)
        start += split.length
    return found


def _name(site: "TapProbe", split: Split) -> str:
    alike = [other for other in site.layout.splits if other.role == split.role]
    number = next(i for i, other in enumerate(alike) if other.start == split.start)
    if split.role is Role.TEMPLATE and len(alike) > 1 and number in (0, len(alike) - 1):
        return "the template's end" if number else "the template's start"
    return BLOCKS[split.role] + (f" {number + 1}" if len(alike) > 1 else "")


def _parts(site: "TapProbe", split: Split, name: str) -> Iterator[Segment]:
    """The parts of a split, counted from its start."""
    n = split.length
    if split.grid is not None:
        grid = (split.grid.frames, split.grid.rows, split.grid.columns)
        yield Segment(f"the opening bracket of {name}", OPENING, name, 0, 0, 0, 1)
        yield Segment(f"the cells of {name}", CELLS, name, 0, 0, 1, n - 1, grid)
        yield Segment(f"the closing bracket of {name}", CLOSING, name, 0, 0, n - 1, n)
        return
    at, ids = 0, site.layout.text_ids[split.rows].tolist()
    known = _known_texts(site) if split.role is Role.TEMPLATE else []
    for said, tokens in known:
        places = [i for i in range(at, n - len(tokens) + 1) if ids[i : i + len(tokens)] == tokens]
        if not places:
            continue
        if places[0] > at:
            yield Segment(f"the text before {said}", TEXT, name, 0, 0, at, places[0])
        at = places[0] + len(tokens)
        yield Segment(said, TEXT, name, 0, 0, places[0], at)
    if at < n:
        yield Segment(f"the end of {name}" if at else name, TEXT, name, 0, 0, at, n)


def _known_texts(site: "TapProbe") -> list[tuple[str, list[int]]]:
    """Texts that are parts of the template's splits, in their order."""
    before = template(site.request)[0]
    instruction = before.partition("system\n")[2].partition("<|im_end|>")[0]
    texts = [("the instruction", instruction)]
    if site.request.understanding:
        texts.append(("the question", user_text(site)))
    return [(said, list(encoded(site, text))) for said, text in texts if text]


def rows(site: "TapProbe") -> tuple[Segment, ...]:
    """The parts of the sequence that the rows of a call's result are, of one expert's where it is of one; () where that
    is not known."""
    try:
        call = call_rows(site)
        whole = [part for part in segments(site, site.tap.arm) if call.start <= part.start and part.stop <= call.stop]
    except DoesNotApply:
        return ()
    latents = [part for part in whole if part.kind == CELLS and site.layout.splits[part.split].mode in LATENTS]
    if len(site.expected) != call.stop - call.start:
        whole = latents if GEN in site.path else [part for part in whole if part not in latents]
    found: list[Segment] = []
    for part in whole:
        start = found[-1].stop if found else 0
        found.append(replace(part, start=start, stop=start + part.length))
    return tuple(found) if found and found[-1].stop == len(site.expected) else ()


def tokens(site: "TapProbe") -> Read:
    """What each token, or each split, of a sequence is."""
    field, _, arm = site.tap.name.removeprefix("inputs/").partition(".")
    if field not in FIELDS:
        raise DoesNotApply
    field, parts = FIELDS[field], segments(site, arm or "cond")
    facts: dict[str, Any] = {"segments": parts, "field": field, "axes": (CALLED[field],)}
    facts["counts"] = field in ("lengths", "answer")
    if field in NAMES:
        facts["names"] = NAMES[field]
    if field in ("lengths", "modes"):
        blocks = list(dict.fromkeys(part.block for part in parts))
        whole = [[part for part in parts if part.block == block] for block in blocks]
        facts["units"] = [_unit(i, block[0].block, block) for i, block in enumerate(whole)]
    if field == "answer":
        facts["units"] = [Segment("the answer", TEXT, "the answer", 0, 0, 0, 1)]
    return {}, facts


def _unit(place: int, name: str, parts: Sequence[Segment]) -> Segment:
    kind = TEXT if all(part.kind == TEXT for part in parts) else CELLS
    return Segment(name, kind, name, parts[0].order, parts[0].split, place, place + 1)


def grids(site: "TapProbe") -> Read:
    """Frames, rows and columns [visuals, 3]."""
    if site.tap.name != "inputs/grids_thw":
        raise DoesNotApply
    seen = [split for split in site.layout.splits if split.grid is not None]
    names = [_name(site, split) for split in seen]
    units = [Segment(name, CELLS, name, i, i, i, i + 1) for i, name in enumerate(names)]
    axes = ("frames", "rows", "columns")
    return {}, {"units": units, "table": True, "counts": True, "axes": axes, "all": "frames, rows and columns"}


def positions(site: "TapProbe") -> Read:
    """Rotary ids [3, n]."""
    ids = site.expected
    if ids.ndim != 2 or len(ids) != 3:
        raise DoesNotApply
    rows = columns(site, ids)
    parts = []
    for part in segments(site, site.tap.arm or "cond"):
        start, stop = max(part.start, rows.start), min(part.stop, rows.stop)
        if start < stop:
            parts.append(replace(part, start=start - rows.start, stop=stop - rows.start))
    if not parts:
        raise DoesNotApply
    # An answer goes on behind its sequence.
    parts[-1] = replace(parts[-1], stop=ids.shape[1])
    return {}, {"segments": parts, "axes": POSITIONS, "all": "positions", "first": rows.start}


KNOWN = (
    Known("tokens", ("sequence",), tokens),
    Known("integers", ("grids",), grids),
    Known("integers", ("positions",), positions),
)
