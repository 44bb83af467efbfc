"""Checksums of the weights and the configuration that a bundle was computed with, and what of a checkpoint is other."""

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from parity.bundle.checks import CONFIG, SUM_DIGITS, WEIGHTS, check_sums
from parity.bundle.reading import Bundle, read_json, sha256
from parity.errors import ParityError, one_line
from reference.config import IGNORED, VISION_IGNORED
from reference.model import VIT_FOLDER
from reference.weights import POSITION_TABLE, VIT_PREFIX, opened, read_vae

_BLOCK = 1 << 22
"""Bytes that are in memory at a time."""
_TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json", "added_tokens.json",
              "special_tokens_map.json")  # fmt: skip


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


def config_sums(checkpoint: Path, variant: str, with_vit: bool) -> dict[str, str]:
    """Return the checksum of every value of a checkpoint's configuration that says something about inference, as
    FILE:KEY, and of every file of the tokenizer; `with_vit` also of the vision tower's configuration.

    Raises ParityError for a file that cannot be read.
    """
    read = {f"{variant}/llm_config.json": IGNORED}
    if with_vit:
        read[f"{VIT_FOLDER}/config.json"] = VISION_IGNORED
    sums = {
        f"{file}:{key}": hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:SUM_DIGITS]
        for file, ignored in read.items()
        for key, value in read_json(checkpoint / file).items()
        if key not in ignored
    }
    files = [f"{variant}/{name}" for name in _TOKENIZER if (checkpoint / variant / name).is_file()]
    return sums | {file: sha256(checkpoint / file)[:SUM_DIGITS] for file in files}


def sums_for(checkpoint: Path, variant: str, request: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return the checksums of what a request reads, by the keys of a manifest; see config_sums and weight_sums."""
    read = checkpoint, variant, _looks(request)
    return {CONFIG: config_sums(*read), WEIGHTS: weight_sums(*read)}


def checkpoint_sum(bundle: Bundle) -> str:
    """Return one checksum of all that a bundle's request reads of the checkpoint."""
    sums = sums_for(bundle.checkpoint, bundle.variant, bundle.request)
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


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


def changed(bundle: Bundle, key: str) -> tuple[str, str] | None:
    """Return the first of a checkpoint's weights (WEIGHTS) or of its configuration (CONFIG) that is not as in the
    capture, and in a sentence how that shows; None where all is, or the bundle holds no such checksums.

    Raises ParityError for checksums that are none, and for files that cannot be read.
    """
    check_sums(bundle.manifest, key, bundle.name)
    expected = bundle.manifest.get(key)
    if expected is None:
        return None
    sums_of, what = {WEIGHTS: (weight_sums, "other weights"), CONFIG: (config_sums, "another configuration")}[key]
    got, place = sums_of(bundle.checkpoint, bundle.variant, _looks(bundle.request)), bundle.checkpoint.name
    differ = [name for name in expected.keys() & got.keys() if expected[name] != got[name]]
    for names, said in (
        (differ, f"it was captured with {what}: {{}} not as in {place}: restore the checkpoint"),
        (expected.keys() - got.keys(), f"manifest.json lists {{}}, which {place} lacks: restore either"),
        (
            got.keys() - expected.keys(),
            f"manifest.json lists no checksum for {{}}, which {place} has: restore either",
        ),
    ):
        if names:
            first, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
            are = "" if names is not differ else " are" if more else " is"
            return first, said.format(f"{first}{more}{are}") + ", or record the bundle again"
    return None


def require_checkpoint(bundle: Bundle) -> None:
    """Raise ParityError where the checkpoint is another one than the bundle was computed with, as far as it tells."""
    for key in (CONFIG, WEIGHTS):
        if problem := changed(bundle, key):
            raise ParityError(f"bundle {bundle.name}: {problem[1]}")


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
