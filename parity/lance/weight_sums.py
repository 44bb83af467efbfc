"""Checksums of the weights that a bundle was computed with, and which of a checkpoint's are others."""

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from parity.bundle.checks import SUM_DIGITS, WEIGHTS, check_weight_sums
from parity.bundle.reading import Bundle
from parity.errors import ParityError, one_line
from reference.model import VIT_FOLDER
from reference.weights import POSITION_TABLE, VIT_PREFIX, opened, read_vae

_BLOCK = 1 << 22
"""Bytes that are in memory at a time."""


def weight_sums(checkpoint: Path, variant: str, with_vit: bool) -> dict[str, str]:
    """Return the checksum of every tensor that a run reads of a checkpoint in the official layout, by its name.

    A checksum is the first 32 hexadecimal digits of the SHA-256 of dtype, shape and the bytes as stored. The names of
    the vision tower's tensors, which are read `with_vit`, begin with "vit_model.", those of the VAE's with "vae.". As
    upstream loads them, what model.safetensors holds of the tower comes over vit.safetensors, and the position table is
    left out (bytedance/Lance inference_lance.py:init_from_model_path_if_needed). Checksums are computed once for as
    long as the files do not change.

    Raises ParityError for a file that cannot be read.
    """
    with one_line(f"the weights of {checkpoint} cannot be read"):
        own = _sums_of(checkpoint / variant / "model.safetensors")
        tower = _sums_of(checkpoint / VIT_FOLDER / "vit.safetensors") if with_vit else {}
        sums = {f"{VIT_PREFIX}{name}": value for name, value in tower.items()}
        sums |= {name: value for name, value in own.items() if with_vit or not name.startswith(VIT_PREFIX)}
        return sums | {f"vae.{name}": value for name, value in _sums_of(checkpoint / "Wan2.2_VAE.pth").items()}


def sums_for(checkpoint: Path, variant: str, request: dict[str, Any]) -> dict[str, str]:
    """Return the checksums of what a bundle's request reads; see weight_sums."""
    return weight_sums(checkpoint, variant, _looks(request))


def has_weights(bundle: Bundle) -> bool:
    """Whether the files of the weights that a bundle's request reads are there, whatever they hold."""
    checkpoint = bundle.checkpoint
    files = [checkpoint / bundle.variant / "model.safetensors", checkpoint / "Wan2.2_VAE.pth"]
    if _looks(bundle.request):
        files.append(checkpoint / VIT_FOLDER / "vit.safetensors")
    return all(file.is_file() for file in files)


def _looks(request: dict[str, Any]) -> bool:
    # A prompt alone, and the picture that a video begins with, are not looked at.
    return isinstance(request["spec"], dict) and request["task"] != "i2v"


def changed_weights(bundle: Bundle) -> list[str]:
    """Return the names of a checkpoint's tensors that are not those which the bundle was computed with.

    These differ, or only one of the two has them. A bundle that holds no checksums has none. Raises ParityError for
    checksums that are none, and for weights that cannot be read.
    """
    check_weight_sums(bundle.manifest, bundle.name)
    expected = bundle.manifest.get(WEIGHTS)
    if expected is None:
        return []
    got = sums_for(bundle.checkpoint, bundle.variant, bundle.request)
    return sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))


def require_weights(bundle: Bundle) -> None:
    """Raise ParityError where the checkpoint holds other weights than the bundle was computed with."""
    if changed := changed_weights(bundle):
        more = f" and {len(changed) - 1} more are not those" if len(changed) > 1 else " is not the one"
        raise ParityError(
            f"bundle {bundle.name} was captured with other weights: {changed[0]}{more} in {bundle.checkpoint}: "
            "restore the checkpoint, or record the bundle again"
        )


def _sums_of(path: Path) -> dict[str, str]:
    status = path.stat() if path.is_file() else None
    return _stored_sums(path.resolve(), status and status.st_size, status and status.st_mtime_ns)


@cache
def _stored_sums(path: Path, size: int | None, mtime_ns: int | None) -> dict[str, str]:
    del size, mtime_ns  # they only tell a changed file apart in the cache
    return dict(_pickled(path) if path.suffix == ".pth" else _streamed(path))


def _streamed(path: Path) -> Iterator[tuple[str, str]]:
    with opened(path):
        pass  # its header is sound
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if name.startswith(POSITION_TABLE):
                continue
            start, stop = entry["data_offsets"]
            digest = _started(entry["dtype"], entry["shape"])
            file.seek(8 + length + start)
            for at in range(start, stop, _BLOCK):
                digest.update(file.read(min(_BLOCK, stop - at)))
            yield name, digest.hexdigest()[:SUM_DIGITS]


def _pickled(path: Path) -> Iterator[tuple[str, str]]:
    import torch

    for name, tensor in read_vae(path).items():
        digest = _started(str(tensor.dtype), list(tensor.shape))
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        yield name, digest.hexdigest()[:SUM_DIGITS]


def _started(dtype: str, shape: list[int]) -> "hashlib._Hash":
    return hashlib.sha256(f"{dtype}{shape}".encode())
