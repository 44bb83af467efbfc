"""The reference as the trusted side of a bundle: loaded, run from given values, and what it lays down as exact."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from parity.bundle.reading import Bundle
from parity.lance.given import replay_of
from parity.lance.names import logits_name
from parity.lance.packed import note_packed, packed_beside
from parity.lance.replay_torch import TorchReplay, preprocess_reference
from parity.lance.splitting import split_passes
from parity.oracle.oracle import Oracle
from parity.tensors.recording import ExactInputs, Recording, Split, Tap
from reference.errors import ReferenceError
from reference.layout import Layout, Mode, Role
from reference.media import read_size, resolutions
from reference.model import Pipeline
from reference.numerics import Numerics
from reference.preprocess import is_drawn
from reference.request import Request
from reference.sampler import time_grid

SEQUENCE = ("text_ids", "modality", "split_lens", "attn_modes")
"""Integers of the sequence that every bundle holds among its inputs."""


def answer_logits(oracle: Oracle, taps: Mapping[str, Tap], step: int) -> np.ndarray | None:
    """The logits float32 [tokens of the tokenizer] of an answer's token in a run; None where it has none."""
    tap = taps.get(logits_name(step))
    return None if tap is None else tap.array.reshape(-1)[: len(oracle.run.pipeline.tokenizer)]


def exact_of(run: TorchReplay) -> ExactInputs:
    """What must be equal before any activation means anything, as the reference lays a request out."""
    layout, request = run.layout, run.request
    arrays = layout.arrays()
    exact = {f"inputs/{name}": arrays[name] for name in SEQUENCE}
    grids = [split.grid for split in layout.splits if split.grid]
    exact["inputs/grids_thw"] = np.array([(grid.frames, grid.rows, grid.columns) for grid in grids], np.int32)
    exact["inputs/position_ids.cond"] = layout.position_ids[:, : layout.answer]
    if request.understanding:
        exact["inputs/answer"] = np.array([layout.answer], np.int32)
    else:
        exact["inputs/timesteps"] = time_grid(request.num_steps, request.timestep_shift).numpy()
        exact["inputs/guided"] = np.array(run.guided, np.int32)
    if not request.understanding and request.guided:
        exact["inputs/text_ids.uncond"] = layout.text_ids[layout.kept]
        exact["inputs/position_ids.uncond"] = unconditional_ids(layout, run.entry)
    splits = tuple(
        Split(
            int(split.role),
            int(split.mode),
            layout.text_ids[split.start : split.stop],
            split.grid and (split.grid.frames, split.grid.rows, split.grid.columns),
            layout.clean_frames if split.mode is Mode.NOISE else 0,
        )
        for split in layout.splits
    )
    return ExactInputs(splits, layout.answer, exact)


def load_run(bundle: Bundle, numerics: Numerics) -> TorchReplay:
    """Load the reference for a bundle's request; raises ReferenceError."""
    pipeline = Pipeline.load(bundle.checkpoint, bundle.variant, numerics)
    note_packed(packed_beside(bundle.checkpoint, bundle.variant), pipeline.model)
    return TorchReplay(pipeline, Request.from_dict(bundle.request), bundle.entry, replay_of(bundle))


def load_trusted(bundle: Bundle, dtype: str | None = None) -> TorchReplay:
    """Load the reference for a bundle's request, in the bundle's numerics or another dtype; raises ReferenceError."""
    return load_run(bundle, Numerics(dtype or bundle.dtype))


def load_wider(bundle: Bundle, dtype: str) -> TorchReplay:
    """The reference for a bundle in a wider dtype, with its weights as the bundle's own policy rounds them."""
    run = load_trusted(bundle, dtype)
    narrow = Numerics(bundle.dtype).torch_dtype
    for part in (run.pipeline.model, run.pipeline.vae, *([run.pipeline.vit_model] if run.layout.vit_splits else [])):
        for parameter in part.parameters():
            parameter.data = parameter.data.to(narrow).to(parameter.dtype)
    return run


def run_passes(run: TorchReplay, force: Mapping[str, Tap]) -> Recording:
    """Run the reference from given values: what it computes at every tap from the given values before it."""
    recording = run.record(force=force)
    for name in run.layout.arrays():
        recording.pop(name, None)
    return recording


def cut(run: TorchReplay, passes: Recording) -> Recording:
    """The taps of passes under the names of the cached entry's calls."""
    if run.entry != "full_sequence":
        return passes
    return split_passes(passes, run.layout)


def visuals_of(run: TorchReplay, media: Path) -> Mapping[str, np.ndarray]:
    """A request's visuals as the reference resizes them, by the names of the bundles' inputs; none where their files
    are not there or cannot be read."""
    with suppress(ReferenceError):
        return preprocess_reference(run.request, media) or {}
    return {}


def drawn_visuals(bundle: Bundle) -> set[str]:
    """Of a request's visuals, by the names of the bundles' inputs, those of which upstream draws where they are cut."""
    request, names = Request.from_dict(bundle.request), set()
    with suppress(ReferenceError):
        sides = dict(zip(("vae_pixels", "vit_patches"), resolutions(request), strict=True))
        for index, element in enumerate(request.visuals):
            file = read_size(bundle.path.parent / element.content, element.medium)
            names |= {f"{name}{index}" for name, side in sides.items() if side is not None and is_drawn(file, side)}
    return names


def unconditional_ids(layout: Layout, entry: str) -> np.ndarray:
    """Rotary ids of the unconditional arm, int32 [3, kept tokens]: in the cached entry the prefix keeps its own."""
    own = layout.uncond_position_ids
    if entry == "full_sequence":
        return own
    prefix = sum(split.length for split in layout.prefix if split.role is not Role.TEXT)
    return np.concatenate([layout.position_ids[:, layout.kept][:, :prefix], own[:, prefix:]], 1)
