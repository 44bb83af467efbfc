"""Records what the reference computes for a request, as a bundle in the format of those captured from upstream."""

import importlib.metadata
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parity.bundle.reading import Bundle
from parity.errors import ParityError, one_line
from parity.lance.given import replay_of
from parity.lance.packed import write_dequantized
from parity.lance.publish import checkpoint_name, publish, staging_beside, with_media
from parity.lance.recorded_taps import INPUTS, RecordedTaps
from parity.lance.replay_torch import TorchReplay
from parity.lance.retention import Retention, RetentionPolicy, keep_whole, parted
from parity.ports.provenance import code_commit
from parity.tensors.recording import Recording, Replay, Tap
from parity.tensors.sketch_file import SKETCH, WHOLE, check_level
from reference.layout import Layout
from reference.model import Pipeline
from reference.numerics import Numerics
from reference.preprocess import Preprocessed, preprocess
from reference.request import Request
from reference.vae_layers import LATENT_CHANNELS

IMPLEMENTATION = "lance-mlx reference"
"""What a recorded bundle's manifest names as its source."""

NUMERICS = ("float32", "bfloat16")


def record(
    out: Path,
    checkpoint: Path,
    request: dict[str, Any],
    entry: str = "kv_cache",
    dtype: str = "bfloat16",
    copy_checkpoint: bool = False,
    progress: Callable[[str], None] | None = None,
    level: str = WHOLE,
    whole: Sequence[str] = (),
) -> Path:
    """Run a request on the reference and write the bundle `out`, whole or not at all; return its path.

    `request` has the form of a bundle's, with paths of images and videos as they are given; `checkpoint` is a folder in
    the official layout. Images and videos are preprocessed by the reference, and copied into media/ beside the bundle
    unless they lie below its folder already. The checkpoint is linked beside the bundle under its own name, or the
    parts that the request needs are copied there.

    From the request's seed PyTorch draws, in this order: the noise [latents, 48] in `dtype`, the pixels of the target's
    placeholder, and the noise of each encoded visual.

    At the level "sketch" a tap that is larger than its sketch is kept as that, but for those whose names or components
    match the fnmatch patterns `whole`, and what a replay is given.

    Raises ParityError for a bad request, checkpoint, image or video, for an `out` that exists, and where the disk is
    full or the folder cannot be written.
    """
    if dtype not in NUMERICS:
        raise ParityError(f"numerics {dtype!r} is not one of {', '.join(NUMERICS)}")
    check_level(level, whole)
    name = checkpoint_name(out, checkpoint)
    with one_line("the request cannot be recorded"):
        variant = variant_for(request, entry)
        asked = Request.from_dict(request)
    if not 0 <= request.get("seed", 0) < 2**64:
        raise ParityError(f"seed {request['seed']} must be between 0 and 2**64 - 1")
    with staging_beside(out) as staging:
        with one_line("the request cannot be recorded"):
            visuals = preprocess(asked, Path())
            pipeline = Pipeline.load(Path(checkpoint), variant, Numerics(dtype))
            layout = pipeline.layout(asked, [visual.size for visual in visuals])
            replay = draw(asked, layout, visuals, dtype, request.get("seed", 0))
            hold = RetentionPolicy(layout, whole) if level == SKETCH else keep_whole
            taps, sketches = _taps(TorchReplay(pipeline, asked, entry, replay), progress, hold)
        manifest = {
            "source": source(entry, dtype),
            "checkpoint": name,
            "variant": variant,
            "request": with_media(request, asked, out.parent, staging),
        }
        kept_as = sketches if level == SKETCH else None
        publish(out, staging, Path(checkpoint), manifest, _inputs(layout, replay), taps, copy_checkpoint, kept_as)
    return out


def quantized_beside(out: Path, checkpoint: Path, request: dict[str, Any], entry: str, dtype: str, what: str) -> Path:
    """Write the quantized checkpoint of a bundle to be recorded, OUT-checkpoint; see packed.write_dequantized."""
    place = out.with_name(f"{out.name}-checkpoint")
    for path in (out, place):
        if os.path.lexists(path):
            raise ParityError(f"{path} exists already: remove it, or record under another name")
    with one_line("the request cannot be recorded"):
        variant = variant_for(request, entry)
    return write_dequantized(place, checkpoint, variant, what, dtype)


def record_again(out: Path, bundle: Bundle, checkpoint: Path, progress: Callable[[str], None] | None = None) -> Path:
    """Run a bundle's request on the reference, from what the bundle gives, with another checkpoint in its layout, and
    write the bundle `out`; the media of the request have to lie beside it.

    Raises ParityError as `record` does.
    """
    name = checkpoint_name(out, checkpoint)
    with staging_beside(out) as staging:
        with one_line("the request cannot be recorded"):
            pipeline = Pipeline.load(checkpoint, bundle.variant, Numerics(bundle.dtype))
            run = TorchReplay(pipeline, Request.from_dict(bundle.request), bundle.entry, replay_of(bundle))
            taps, _ = _taps(run, progress, keep_whole)
        manifest = {
            "source": source(bundle.entry, bundle.dtype),
            "checkpoint": name,
            "variant": bundle.variant,
            "request": bundle.request,
        }
        publish(out, staging, checkpoint, manifest, _inputs(run.layout, run.replay), taps, False)
    return out


def _taps(run: TorchReplay, progress: Callable[[str], None] | None, hold: Retention) -> tuple[Recording, dict]:
    """What a bundle holds of a run: whole taps, and sketches."""
    kept = RecordedTaps(run.entry, run.request.num_steps)
    return parted(run.record(kept, progress, hold=hold))


def variant_for(request: dict[str, Any], entry: str) -> str:
    """Return the checkpoint's folder for a request's task; raises LanceError for what lance_mlx cannot run."""
    from parity.lance.replay_mlx import request_from_bundle

    return request_from_bundle(request, entry).variant.value


def draw(request: Request, layout: Layout, visuals: Sequence[Preprocessed], dtype: str, seed: int) -> Replay:
    """Return what a run is given: the preprocessed visuals, and what PyTorch draws from the seed; see record."""
    patches = tuple(visual.vit_patches for visual in visuals if visual.vit_patches is not None)
    grids = tuple(visual.vit_grid for visual in visuals if visual.vit_grid is not None)
    if request.understanding:
        return Replay(vit_patches=patches, vit_grids=grids)
    generator = torch.Generator().manual_seed(seed)
    shape = len(layout.latent_rows), LATENT_CHANNELS
    noise = torch.randn(shape, generator=generator, dtype=Numerics(dtype).torch_dtype).float().numpy()
    pixels = [visual.vae_pixels for visual in visuals]
    if visuals:
        placeholder = torch.randn(3, *layout.target.size, generator=generator).numpy()
        if request.task == "i2v":
            # Upstream repeats the picture over the first four frames.
            placeholder[:, :4] = pixels.pop()
        pixels.append(placeholder)
    eps = []
    for t, h, w in (split.size for split in layout.latent_splits[: len(pixels)]):
        grid = (t - 1) // 4 + 1, h // 16, w // 16
        eps.append(torch.randn(1, LATENT_CHANNELS, *grid, generator=generator).numpy())
    return Replay(noise, tuple(map(np.ascontiguousarray, pixels)), patches, grids, tuple(eps))


def source(entry: str, dtype: str) -> dict[str, str]:
    """Return what a manifest says about where the tensors come from; the commit only where it is known."""
    known = {"implementation": IMPLEMENTATION}
    try:
        known["version"] = importlib.metadata.version("lance-mlx")
    except importlib.metadata.PackageNotFoundError:
        pass
    commit = code_commit()
    if commit:
        known["commit"] = commit
    return known | {"entry": entry, "torch": torch.__version__, "device": "cpu", "dtype": dtype}


def _inputs(layout: Layout, replay: Replay) -> Recording:
    arrays = layout.arrays()
    inputs = {name: Tap(arrays[name], "int32") for name in INPUTS if name in arrays}
    for kind, given in (("vae_pixels", replay.vae_pixels), ("vit_patches", replay.vit_patches)):
        inputs |= {f"{kind}{index}": Tap(array, "float32") for index, array in enumerate(given)}
    return inputs
