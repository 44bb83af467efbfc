"""Where a recorded bundle goes: written beside its place, with the checkpoint and the media that it names."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from parity.bundle.reading import read_bundle, sha256, write_bundle
from parity.bundle.store import seal
from parity.errors import ParityError
from parity.files import folder_beside
from parity.lance.names import parse
from parity.lance.weight_sums import sums_for
from parity.tensors.recording import Recording, Tap
from parity.tensors.sketch import Sketch
from reference.model import VIT_FOLDER
from reference.request import Medium, Request

VARIANTS = ("Lance_3B", "Lance_3B_Video")


def publish(
    out: Path,
    staging: Path,
    checkpoint: Path,
    manifest: dict[str, Any],
    inputs: Recording,
    taps: Recording,
    copy_checkpoint: bool,
    sketches: Mapping[str, Sketch] | None = None,
) -> None:
    """Write a bundle in the staging folder, read it once as everybody will, and move it to `out`.

    Checksums of the weights and the configuration are added to the manifest. The checkpoint, and what `with_media`
    staged, take their places beside it. With `sketches`, also with none of them, the bundle is of the level "sketch".
    Raises ParityError where a tap is not finite or the bundle cannot be used.
    """
    _check_finite({**taps, **(sketches or {})})
    name, variant = manifest["checkpoint"], manifest["variant"]
    manifest = manifest | sums_for(checkpoint, variant, manifest["request"])
    # Beside the staged bundle as beside the final one, so that it is read once before anybody sees it.
    (staging / name).symlink_to(checkpoint.resolve(), target_is_directory=True)
    write_bundle(staging / out.name, manifest, inputs, taps, sketches)
    seal(staging / out.name)
    read_bundle(staging / out.name)
    _place_checkpoint(out.parent, name, checkpoint, variant, staging, copy_checkpoint)
    place_media(out.parent, staging)
    os.rename(staging / out.name, out)


def _check_finite(taps: Mapping[str, Tap | Sketch]) -> None:
    for name in sorted(taps, key=lambda name: parse(name).place):
        tap = taps[name]
        if tap.statistics[:, -1].any() if isinstance(tap, Sketch) else not np.isfinite(tap.array).all():
            raise ParityError(f"{name} holds NaN or infinity: nothing is written; check the checkpoint's weights")


@contextmanager
def staging_beside(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, removed at the end; what is left of it when a process is killed is no bundle."""
    try:
        with folder_beside(out) as staging:
            yield staging
    except (OSError, ParityError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise ParityError(f"{out} cannot be written: {cause.strerror or cause}") from error


def checkpoint_name(out: Path, checkpoint: Path) -> str:
    """Return the name under which the checkpoint is to lie beside the bundle; raises ParityError where it cannot."""
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


def with_media(request: dict[str, Any], asked: Request, root: Path, staging: Path) -> dict[str, Any]:
    """Return the request with the paths of its images and videos relative to the bundle's folder; copies are staged."""
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


def place_media(root: Path, staging: Path) -> None:
    """Move the staged copies of images and videos into media/ of a folder."""
    for file in sorted((staging / "media").glob("*")):
        (root / "media").mkdir(exist_ok=True)
        if not (root / "media" / file.name).exists():
            os.rename(file, root / "media" / file.name)
