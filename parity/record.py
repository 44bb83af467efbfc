"""Records what the reference computes for a request, as a bundle in the format of those captured from upstream."""

import importlib.metadata
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lance_mlx.visuals import PreparedVisual, prepare_visuals
from parity.bundle import read_bundle, sha256, write_bundle
from parity.errors import ParityError
from parity.implementations import one_line
from parity.provenance import code_commit
from parity.recording import Recording, Replay, Tap
from parity.registry import parse
from parity.replay_mlx import request_from_bundle
from parity.replay_torch import record_pipeline
from parity.store import seal
from reference.layout import Layout, VisualSize
from reference.model import VIT_FOLDER, Pipeline
from reference.numerics import Numerics
from reference.request import Medium, Request
from reference.vae_layers import LATENT_CHANNELS

IMPLEMENTATION = "lance-mlx reference"
"""What a recorded bundle's manifest names as its source."""

NUMERICS = ("float32", "bfloat16")
VARIANTS = ("Lance_3B", "Lance_3B_Video")

INPUTS = (
    *("text_ids", "modality", "split_lens", "attn_modes", "video_grid_thw", "video_sizes", "vae_video_grid_thw"),
    *("vit_video_grid_thw", "packed_vae_token_indexes", "packed_vit_token_indexes", "mse_loss_indexes"),
    "ce_loss_indexes",
)
"""The integers of a layout that a bundle's inputs hold."""

def record(
    out: Path,
    checkpoint: Path,
    request: dict[str, Any],
    entry: str = "kv_cache",
    dtype: str = "bfloat16",
    copy_checkpoint: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Run a request on the reference and write the bundle `out`, whole or not at all; return its path.

    `request` has the form of a bundle's, with paths of images and videos as they are given; `checkpoint` is a folder in
    the official layout. Images and videos are preprocessed by lance_mlx.visuals, since the reference knows their sizes
    alone, and copied into media/ beside the bundle unless they lie below its folder already. The checkpoint is linked
    beside the bundle under its own name, or the parts that the request needs are copied there.

    From the request's seed PyTorch draws, in this order: the noise [latents, 48] in `dtype`, the pixels of the target's
    placeholder, and the noise of each encoded visual.

    Raises ParityError for a bad request, checkpoint, image or video, for an `out` that exists, and where the disk is
    full or the folder cannot be written.
    """
    if dtype not in NUMERICS:
        raise ParityError(f"numerics {dtype!r} is not one of {', '.join(NUMERICS)}")
    name = _checkpoint_name(out, checkpoint)
    with one_line("the request cannot be recorded"):
        ours = request_from_bundle(request, entry)
        asked = Request.from_dict(request)
    if not 0 <= request.get("seed", 0) < 2**64:
        raise ParityError(f"seed {request['seed']} must be between 0 and 2**64 - 1")
    with _staging(out) as staging:
        with one_line("the request cannot be recorded"):
            visuals = prepare_visuals(ours)
            pipeline = Pipeline.load(Path(checkpoint), ours.variant.value, Numerics(dtype))
            layout = pipeline.layout(asked, [size_of(visual) for visual in visuals])
            replay = draw(asked, layout, visuals, dtype, request.get("seed", 0))
            kept = RecordedTaps(entry, asked.num_steps)
            taps = record_pipeline(pipeline, asked, entry, replay, kept, progress)
        _check_finite(taps)
        manifest = {
            "source": source(entry, dtype),
            "checkpoint": name,
            "variant": ours.variant.value,
            "request": _with_media(request, asked, out.parent, staging),
        }
        # Beside the staged bundle as beside the final one, so that it is read once before anybody sees it.
        (staging / name).symlink_to(Path(checkpoint).resolve(), target_is_directory=True)
        write_bundle(staging / out.name, manifest, _inputs(layout, replay), taps)
        seal(staging / out.name)
        read_bundle(staging / out.name)
        _place_checkpoint(out.parent, name, Path(checkpoint), ours.variant.value, staging, copy_checkpoint)
        _place_media(out.parent, staging)
        os.rename(staging / out.name, out)
    return out


def draw(request: Request, layout: Layout, visuals: Sequence[PreparedVisual], dtype: str, seed: int) -> Replay:
    """Return what a run is given: the preprocessed visuals, and what PyTorch draws from the seed; see record."""
    patches = tuple(visual.vit_patches for visual in visuals if visual.vit_patches is not None)
    grids = tuple(visual.vit_grid for visual in visuals if visual.vit_grid is not None)
    if request.understanding:
        return Replay(vit_patches=patches, vit_grids=grids)
    generator = torch.Generator().manual_seed(seed)
    shape = len(layout.latent_rows), LATENT_CHANNELS
    noise = torch.randn(shape, generator=generator, dtype=Numerics(dtype).torch_dtype).float().numpy()
    pixels = [visual.pixels.transpose(3, 0, 1, 2) for visual in visuals]
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


def size_of(visual: PreparedVisual) -> VisualSize:
    """Return the size of a preprocessed visual as the reference lays it out."""
    return VisualSize(None if visual.pixels is None else visual.pixels.shape[:3], visual.vit_grid)


def _inputs(layout: Layout, replay: Replay) -> Recording:
    arrays = layout.arrays()
    inputs = {name: Tap(arrays[name], "int32") for name in INPUTS if name in arrays}
    for kind, given in (("vae_pixels", replay.vae_pixels), ("vit_patches", replay.vit_patches)):
        inputs |= {f"{kind}{index}": Tap(array, "float32") for index, array in enumerate(given)}
    return inputs


def _check_finite(taps: Recording) -> None:
    for name in sorted(taps, key=lambda name: parse(name).place):
        if not np.isfinite(taps[name].array).all():
            raise ParityError(f"{name} holds NaN or infinity: nothing is written; check the checkpoint's weights")


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, removed at the end; what is left of it when a process is killed is no bundle."""
    staging = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        yield staging
    except (OSError, ParityError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise ParityError(f"{out} cannot be written: {cause.strerror or cause}") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _checkpoint_name(out: Path, checkpoint: Path) -> str:
    """The name under which the checkpoint is to lie beside the bundle; raises ParityError where that is impossible."""
    if os.path.lexists(out):
        raise ParityError(f"{out} exists already: remove it, or record under another name")
    if not any((Path(checkpoint) / variant).is_dir() for variant in VARIANTS):
        raise ParityError(f"{checkpoint} is no checkpoint: name the folder that holds {' or '.join(VARIANTS)}")
    name = Path(os.path.abspath(checkpoint)).name
    if name in ("", out.name, "media"):
        raise ParityError(f"checkpoint {checkpoint} cannot lie beside {out.name}: rename the bundle or the checkpoint")
    there = out.parent / name
    if os.path.lexists(there) and there.resolve() != Path(checkpoint).resolve():
        raise ParityError(f"{there} is another checkpoint than {checkpoint}: name that one, or record elsewhere")
    return name


def _place_checkpoint(root: Path, name: str, checkpoint: Path, variant: str, staging: Path, copy: bool) -> None:
    there = root / name
    if os.path.lexists(there) and not (copy and there.is_symlink()):
        return
    if not copy:
        # A relative link survives when both move together.
        there.symlink_to(os.path.relpath(checkpoint.resolve(), root.resolve()), target_is_directory=True)
        return
    copied = staging / "checkpoint"
    for folder in (variant, VIT_FOLDER):
        if (checkpoint / folder).is_dir():
            shutil.copytree(checkpoint / folder, copied / folder)
    for file in checkpoint.glob("Wan2.2_VAE.*"):
        shutil.copy2(file, copied)
    if there.is_symlink():
        there.unlink()
    os.rename(copied, there)


def _with_media(request: dict[str, Any], asked: Request, root: Path, staging: Path) -> dict[str, Any]:
    """The request with the paths of its images and videos relative to the bundle's folder; copies are staged."""
    if not asked.visuals:
        return request
    elements = []
    for element in asked.elements:
        content = element.content if isinstance(element.content, str) else list(element.content)
        elements.append(content if element.medium is Medium.TEXT else _stage(Path(content), root, staging))
    return request | {"spec": request["spec"] | {"interleave_array": elements}}


def _stage(file: Path, root: Path, staging: Path) -> str:
    if file.resolve().is_relative_to(root.resolve()):
        return file.resolve().relative_to(root.resolve()).as_posix()
    name, digest = file.name, sha256(file)
    for taken in (root / "media" / name, staging / "media" / name):
        if taken.exists() and sha256(taken) != digest:
            name = f"{file.stem}-{digest[:12]}{file.suffix}"
    (staging / "media").mkdir(exist_ok=True)
    shutil.copyfile(file, staging / "media" / name)
    return f"media/{name}"


def _place_media(root: Path, staging: Path) -> None:
    for file in sorted((staging / "media").glob("*")):
        (root / "media").mkdir(exist_ok=True)
        if not (root / "media" / file.name).exists():
            os.rename(file, root / "media" / file.name)
