"""Floors kept beside a bundle's taps."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from parity.bundle import Bundle, sha256
from parity.errors import ParityError
from parity.floors import FREE, LOCAL, Floors, Progress, floats_of, measure_free, measure_local
from parity.oracle import Oracle
from parity.recording import write_atomically
from parity.sketch_file import FILE as SKETCHES

FILE = "floors.safetensors"
_FORMAT = "lance-floors/3"
_FACTS = "floors"


def local_floors(oracle: Oracle, progress: Progress | None = None) -> Floors:
    """Floors from the oracle's input for all taps: those stored with the bundle, or measured where none fit it.

    Raises ParityError when the reference cannot run.
    """
    stored = _read(oracle.bundle, LOCAL, floats_of(oracle.taps), _names_sum(oracle.taps))
    return stored or measure_local(oracle, progress)


def free_floors(bundle: Bundle, progress: Progress | None = None) -> Floors:
    """Floors from a run's own input for the bundle's taps: those stored with it, or measured where none fit it.

    Raises ParityError when the reference cannot run.
    """
    stored = _read(bundle, FREE, floats_of(bundle.expected), _names_sum(bundle.expected))
    return stored or measure_free(bundle, progress)


def write_floors(path: Path, oracle: Oracle, local: Floors, free: Floors) -> None:
    """Write floors beside a bundle's taps, whole or not at all."""
    both = {LOCAL: local, FREE: free}
    arrays = {
        LOCAL: _packed(np.stack(list(local.errors.values()))),
        FREE: _packed(np.stack(list(free.errors.values()))),
        **{f"{kind}_{d}": _packed(found) for kind, f in both.items() for d, found in f.ratios.items()},
        "upstream": _packed(np.array(list(free.upstream.values()), np.float32)),
    }
    facts = {
        "format": _FORMAT,
        "taps_sha256": _taps_sum(oracle.bundle),
        f"{LOCAL}_names": _names_sum(oracle.taps),
        f"{FREE}_names": _names_sum(oracle.bundle.expected),
        **{f"{kind}_variants": f.variants for kind, f in both.items()},
        **{f"{kind}_count": f.count for kind, f in both.items()},
        "leading": free.leading,
        "torch": torch.__version__,
    }
    # One entry: safetensors writes several in no order, and the same floors are to make the same bytes.
    write_atomically(path, save(arrays, {_FACTS: json.dumps(facts)}))


def _packed(values: np.ndarray) -> np.ndarray:
    """Binary logarithms in half precision: good to one part in a hundred, in half the room."""
    with np.errstate(divide="ignore"):
        return np.log2(values).astype(np.float16)


def _unpacked(logarithms: np.ndarray) -> np.ndarray:
    return np.exp2(logarithms.astype(np.float32))


def _read(bundle: Bundle, kind: str, names: list[str], names_sum: str) -> Floors | None:
    """The floors stored with a bundle; None where there are none or they were measured on another capture.

    Raises ParityError for a file that is damaged.
    """
    path = bundle.path / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            facts = dict(json.loads((file.metadata() or {}).get(_FACTS, "{}")))
            wanted = {"format": _FORMAT, "taps_sha256": _taps_sum(bundle), f"{kind}_names": names_sum}
            if any(facts.get(key) != value for key, value in wanted.items()):
                return None
            errors = dict(zip(names, _unpacked(file.get_tensor(kind)), strict=True))
            distances = _unpacked(file.get_tensor("upstream")).tolist() if kind == FREE else []
            upstream = dict(zip(names, distances, strict=False))
            count = facts[f"{kind}_count"]
            ratios = {dtype: _unpacked(file.get_tensor(f"{kind}_{dtype}")) for dtype in count}
            return Floors(tuple(facts[f"{kind}_variants"]), errors, ratios, count, upstream, facts["leading"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ParityError(f"{path} is not a complete file of floors ({error}): remove or replace it") from None


def _taps_sum(bundle: Bundle) -> str:
    """What floors belong to: the capture."""
    own = sha256(bundle.path / "taps.safetensors")
    return own if not bundle.sketches else f"{own} {sha256(bundle.path / SKETCHES)}"


def _names_sum(taps: Iterable[str]) -> str:
    """The names of taps in the order of the table's rows: finer ones come from the reference, which may get others."""
    return hashlib.sha256("\n".join(taps).encode()).hexdigest()
