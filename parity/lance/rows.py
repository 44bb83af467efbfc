"""Whose the rows of a tap are: which part of the sequence, expert and latent frame each belongs to.

The process that runs a clone of upstream reads this file with NumPy and PyTorch alone.
"""

from dataclasses import replace

import numpy as np

from parity.tensors.names import TapName
from parity.tensors.recording import Recording
from reference.layout import MERGE, Layout, Mode, Role, Split
from reference.positions import Grid

ROLE_NAMES = {
    Role.TEMPLATE: "template",
    Role.TEXT: "prompt",
    Role.NOISE: "noise",
    Role.SOURCE: "clean VAE",
    Role.SUBJECT: "reference image",
    Role.VIT: "ViT",
}
BRACKET = "brackets"


def layout_of(inputs: Recording) -> Layout:
    """The sequence that a bundle's inputs describe: splits, roles and grids, without positions and sizes in pixels."""
    arrays = {name: tap.array for name, tap in inputs.items()}
    lengths, modes = arrays["split_lens"].tolist(), arrays["attn_modes"].tolist()
    grids = iter(arrays["video_grid_thw"].reshape(-1, 3).tolist() if "video_grid_thw" in arrays else ())
    splits, start = [], 0
    for length, mode in zip(lengths, map(Mode, modes), strict=True):
        role, grid = Role(int(arrays["modality"][start])), None
        if mode is not Mode.CAUSAL:
            frames, rows, columns = next(grids)
            grid = Grid(frames, rows // MERGE, columns // MERGE)
        splits.append(Split(start, length, mode, role, grid))
        start += length
    none = np.zeros((3, 0), np.int32)
    if "ce_loss_indexes" in arrays:
        return Layout(arrays["text_ids"], splits, none, none, answer=int(arrays["ce_loss_indexes"].reshape(-1)[0]) + 1)
    layout = Layout(arrays["text_ids"], splits, none, none)
    grid = layout.target.grid
    given = layout.target.length - 2 - arrays["mse_loss_indexes"].size
    return replace(layout, clean_frames=given // (grid.rows * grid.columns))


def split_of(tap: TapName, layout: Layout) -> Split | None:
    """The split that a call is about; None for calls that are about no single one."""
    part = tap.call.rpartition(".")[2]
    splits = [split for split in layout.splits if tap.arm != "uncond" or split.role is not Role.TEXT]
    if part.startswith("step"):
        return next((split for split in splits if split.mode is Mode.NOISE), None)
    if part.startswith(("prefix", "prefill")):
        index = tap.numbers["index"]
        return splits[index] if index < len(splits) else None
    return None


def row_roles(tap: TapName, rows: int, layout: Layout) -> list[str] | None:
    """Whose each row of a tap is; None where that is not known."""
    if tap.name.startswith("inputs/"):
        return _sequence_roles(tap, rows, layout)
    split = split_of(tap, layout)
    if split is None:
        return None
    inner = ROLE_NAMES[split.role]
    if split.grid is None:
        return [inner] * rows
    held = split.length - 2
    if split.mode is Mode.NOISE and layout.clean_frames:
        clean = layout.clean_frames * split.grid.rows * split.grid.columns
        labels = ["clean frame"] * clean + [inner] * (held - clean)
    else:
        labels = [inner] * held
    whole = [BRACKET, *labels, BRACKET]
    return _of_block(tap, rows, whole, [BRACKET] * 2)


def _of_block(tap: TapName, rows: int, whole: list[str], brackets: list[str] | None) -> list[str] | None:
    """The labels of so many rows of a visual block: all of it, what is between its brackets, or those alone."""
    known = {len(whole): whole, 2: brackets}
    if len(whole) != 4 or "_moe_gen" in tap.path:
        known[len(whole) - 2] = whole[1:-1]
    return known.get(rows)


def _sequence_roles(tap: TapName, rows: int, layout: Layout) -> list[str] | None:
    splits = [split for split in layout.splits if not tap.name.endswith(".uncond") or split.role is not Role.TEXT]
    labels: list[str] = []
    for split in splits:
        inner = [ROLE_NAMES[split.role]] * split.length
        labels += [BRACKET, *inner[2:], BRACKET] if split.grid else inner
    return labels[:rows] if rows <= len(labels) else None


def row_experts(tap: TapName, rows: int, layout: Layout) -> list[str] | None:
    """Which expert computes each row of a tap."""
    split = split_of(tap, layout)
    if split is None or split.mode not in (Mode.NOISE, Mode.FULL_NOISE) or rows != split.length:
        return None
    return ["UND", *["GEN"] * (rows - 2), "UND"]


def row_frames(tap: TapName, rows: int, layout: Layout) -> list[str] | None:
    """Which latent frame each row of a tap belongs to; brackets belong to none."""
    split = split_of(tap, layout)
    if tap.axes.startswith("latent") and layout.answer is None:
        splits = layout.latent_splits
        frames = [str(f) for s in splits for f in range(s.grid.frames) for _ in range(s.grid.rows * s.grid.columns)]
        return frames if len(frames) == rows else None
    if split is None or split.grid is None or split.grid.frames < 2:
        return None
    labels = [str(frame) for frame in range(split.grid.frames) for _ in range(split.grid.rows * split.grid.columns)]
    return _of_block(tap, rows, [BRACKET, *labels, BRACKET], None)
