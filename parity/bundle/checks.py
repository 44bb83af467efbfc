"""What a bundle's manifest, inputs and taps must be, each checked by itself; every error names the bundle."""

import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np

from parity.errors import ParityError
from parity.tensors.names import parse
from parity.tensors.recording import Recording, Tap
from parity.tensors.sketch import Sketch

WEIGHTS = "weights"
"""Key of a manifest under which a bundle lists the checksums of the weights that it was computed with."""
CONFIG = "config"
"""Key of a manifest under which a bundle lists the checksums of the configuration and the tokenizer beside them."""
SUM_DIGITS = 32
ROLES = range(-1, 5)
ATTN_MODES = range(4)


def check_sums(manifest: Mapping[str, Any], key: str, bundle: str) -> None:
    """Raise ParityError unless the checksums that a manifest holds under WEIGHTS or CONFIG, if any, are some."""
    sums = manifest.get(key, {})
    if not isinstance(sums, dict) or key in manifest and not sums:
        raise ParityError(f"{key!r} in manifest.json of bundle {bundle} must map names to checksums: copy it again")
    for name, value in sums.items():
        if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-f]{{{SUM_DIGITS}}}", value):
            raise ParityError(
                f"{key!r} in manifest.json of bundle {bundle} gives {name} {value!r:.60}, "
                f"which is no checksum of {SUM_DIGITS} hexadecimal digits: copy it again"
            )


def check_listing(
    entries: Sequence[Mapping[str, Any]],
    held: Mapping[str, tuple[Sequence[int], str]],
    sketches: Container[str],
    bundle: str,
) -> None:
    """Raise ParityError unless the taps that a manifest lists are those that are held, of these shapes and dtypes.

    Args:
        held: shape and dtype of every tensor in taps.safetensors.
        sketches: names of the taps that are sketches.
    """
    listed = [entry["name"] for entry in entries]
    if not listed:
        raise ParityError(f"bundle {bundle} lists no taps: copy its manifest.json again, or capture it again")
    twice = {name for name in listed if listed.count(name) > 1} if len(set(listed)) < len(listed) else set()
    if twice:
        raise ParityError(f"bundle {bundle} lists tap {min(twice)} twice: capture the bundle again")
    if unlisted := sorted(set(held) - set(listed)):
        what = f"taps.safetensors of bundle {bundle} holds {unlisted[0]}"
        raise ParityError(f"{what}, which is not in its manifest: copy both again")
    for entry in entries:
        name = entry["name"]
        what = f"tap {name} of bundle {bundle}"
        integer = _is_integer(name, f"bundle {bundle}")
        if name in sketches:
            continue
        if name not in held:
            raise ParityError(f"{what} is listed in the manifest but missing from taps.safetensors: copy it again")
        shape, dtype = held[name]
        if list(shape) != entry["shape"]:
            raise ParityError(f"{what} has shape {list(shape)}, its manifest says {entry['shape']}: copy both again")
        if dtype != entry["dtype"]:
            raise ParityError(f"{what} has dtype {dtype}, its manifest says {entry['dtype']}: copy both again")
        if (dtype == "int32") != integer:
            wanted = "int32" if integer else "a float"
            raise ParityError(f"{what} has dtype {dtype}, but it must be {wanted}: capture it again")


def check_finite(tap: Tap | Sketch, what: str) -> None:
    """Raise ParityError for a tap that holds NaN or infinity."""
    if isinstance(tap, Sketch):
        if tap.statistics[:, -1].any():
            raise ParityError(f"{what} holds NaN or infinity: the capture is broken, repeat it")
        return
    bad = np.argwhere(~np.isfinite(tap.array))
    if len(bad):
        at = [int(i) for i in bad[0]]
        raise ParityError(f"{what} holds {tap.array[tuple(at)]} at {at}: the capture is broken, repeat it")


def check_inputs(inputs: Recording, vocabulary: object, bundle: str) -> None:
    """Raise ParityError unless the inputs of a bundle are finite, known, and fit each other and the vocabulary."""
    what = f"inputs.safetensors of bundle {bundle}"
    if not isinstance(vocabulary, int):
        raise ParityError(f"llm_config.json of bundle {bundle} gives no vocab_size: restore the checkpoint")
    for name, tap in inputs.items():
        _is_integer(f"inputs/{name}", what)
        check_finite(tap, f"{name} in {what}")
    ints = {name: tap.array for name, tap in inputs.items() if tap.dtype == "int32"}
    for name in ("text_ids", "modality", "split_lens", "attn_modes"):
        if name not in ints or ints[name].ndim != 1:
            raise ParityError(f"{what} lacks {name} as a list of int32: copy the bundle again")
    length = len(ints["text_ids"])
    if len(ints["modality"]) != length or ints["split_lens"].sum() != length or np.any(ints["split_lens"] < 1):
        raise ParityError(f"{what}: modality and split_lens must cover the {length} tokens of text_ids: copy it again")
    if len(ints["attn_modes"]) != len(ints["split_lens"]):
        raise ParityError(f"{what}: attn_modes and split_lens differ in length: copy it again")
    bounds = {"text_ids": range(vocabulary), "modality": ROLES, "attn_modes": ATTN_MODES}
    bounds |= {name: range(length) for name in ints if name.endswith("_indexes")}
    bounds |= {name: range(1, 2**31) for name in ints if name.endswith("_thw") or name == "video_sizes"}
    for name, allowed in bounds.items():
        values = ints[name]
        if values.size and not (allowed.start <= values.min() and values.max() < allowed.stop):
            wrong = values.min() if values.min() < allowed.start else values.max()
            ends = f"{allowed.start} to {allowed.stop - 1}"
            raise ParityError(f"{what}: {name} holds {wrong}, outside {ends}: copy it again")


def _is_integer(name: str, what: str) -> bool:
    """Whether the taps of a name hold integers; raises ParityError for a name that means nothing."""
    try:
        return parse(name).integer
    except ParityError as error:
        raise ParityError(f"{what}: {error}") from None
