"""What a streamed comparison runs: a request at one step, the same noise for both sides, and what is known of it."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lance_mlx.config import SPATIAL_STRIDE, TEMPORAL_STRIDE
from lance_mlx.requests.visuals import prepare_visuals
from parity.bundle.reading import Bundle, open_bundle
from parity.errors import ParityError, one_line
from parity.lance.given import replay_of
from parity.lance.record import NUMERICS
from parity.lance.record_options import Options, build_request
from parity.lance.replay_mlx import request_from_bundle
from parity.tensors.recording import Recording, Replay, Tap
from reference.vae_layers import LATENT_CHANNELS

TASKS = ("t2i", "t2v", "x2t_image")
"""The tasks that can be streamed."""


@dataclass(frozen=True)
class StreamPlan:
    """A request that is run for one step.

    Attributes:
        name: what to call the run.
        replay: what both sides are given.
        given: taps that are expected, by name; what is missing the reference computes from them.
        bundle: that they are of, for a port that is loaded for one; None for a request of its own.
    """

    name: str
    checkpoint: Path
    variant: str
    request: dict[str, Any]
    numerics: str
    replay: Replay
    given: Mapping[str, Tap] = field(default_factory=Recording)
    bundle: Bundle | None = None


def plan_live(checkpoint: Path, task: str, options: Options, numerics: str) -> StreamPlan:
    """A run of a request of its own, its noise drawn by NumPy from the seed; raises ParityError for what cannot be."""
    _check(task, numerics)
    # Only the first step is run; a single one begins at the same time.
    request = build_request(task, options)
    with one_line("the request cannot be streamed"):
        asked = request_from_bundle(request, "kv_cache")
        if task == "x2t_image":
            visuals = prepare_visuals(asked)
            patches = tuple(visual.vit_patches for visual in visuals)
            replay = Replay(vit_patches=patches, vit_grids=tuple(visual.vit_grid for visual in visuals))
        else:
            count = math.prod(asked.latent_grid)
            noise = np.random.default_rng(options.seed).standard_normal((count, LATENT_CHANNELS), np.float32)
            replay = Replay(noise)
    name = f"{checkpoint.resolve().name}-{task}"
    return StreamPlan(name, checkpoint, asked.variant.value, request, numerics, replay)


@contextmanager
def plan_against(path: Path, checkpoint: Path | None = None) -> Iterator[StreamPlan]:
    """A run of a bundle's request from its noise, its taps expected; they are read as they are needed.

    `checkpoint` is the one beside the bundle by default. Raises ParityError for a bundle of another task or entry, or
    one that is damaged.
    """
    with open_bundle(path, checkpoint) as bundle:
        _check(bundle.task, bundle.dtype)
        if bundle.entry != "kv_cache":
            raise ParityError(f"bundle {path.name} follows the full-sequence entry: stream one of the KV-cache entry")
        how = bundle.request, bundle.dtype, replay_of(bundle)
        yield StreamPlan(bundle.name, bundle.checkpoint, bundle.variant, *how, bundle.taps, bundle)


def size_of_latents(count: int, num_frames: int) -> tuple[int, int]:
    """Width and height in pixels of so many latents in all, as square as they can be; raises ParityError."""
    frames = (num_frames - 1) // TEMPORAL_STRIDE + 1
    cells, rest = divmod(count, frames)
    if rest or cells < 1:
        raise ParityError(f"{count} latents cannot be shared by {frames} latent frames: choose a multiple of {frames}")
    rows = next(rows for rows in range(math.isqrt(cells), 0, -1) if cells % rows == 0)
    return SPATIAL_STRIDE * (cells // rows), SPATIAL_STRIDE * rows


def _check(task: str, numerics: str) -> None:
    if task not in TASKS:
        raise ParityError(f"task {task!r} cannot be streamed: choose one of {', '.join(TASKS)}")
    if numerics not in NUMERICS:
        raise ParityError(f"numerics {numerics!r} is not one of {', '.join(NUMERICS)}")
