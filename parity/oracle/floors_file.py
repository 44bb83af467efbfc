"""Floors kept beside a bundle's taps, and those of this machine in a cache outside of any repository."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from parity.bundle.reading import ENTRIES, read_bundle, read_json, sha256
from parity.errors import FloorsRefused, ParityError
from parity.files import folder_beside, write_atomically
from parity.model import definition
from parity.oracle.floors import FLOORS, Floors, FloorSet, carrying, floats_of, logits_of, measure, pooled
from parity.oracle.judgement import Judgement, judge
from parity.oracle.machines import facts, machine
from parity.oracle.oracle import FREE, KINDS, Oracle
from parity.tensors.recording import DTYPES

FILE = "floors.safetensors"
CACHE = "LANCE_PARITY_CACHE"
"""Environment variable with the folder of what is measured on this machine; by default ~/.cache/lance-parity."""
_FORMAT = "lance-floors/6"
_FACTS = "floors"
_TABLES = ("levels", "flips", "spreads")
# A float32 run is off by a millionth; a floor of more is none.
_LARGEST = {"float32": 1e-2, "bfloat16": 2.0}


def judge_bundle(path: Path, progress: Callable[[str], None] | None = None) -> Judgement:
    """Run the reference for a bundle, with its variants where their floors are not known yet, and judge it.

    Raises ParityError for a bundle that is unusable or that the reference cannot run.
    """
    return judged(Oracle.of(read_bundle(path)), progress)[1]


def floors_of(oracle: Oracle, progress: Callable[[str], None] | None = None) -> FloorSet:
    """The floors of a bundle for this machine; see judged."""
    return judged(oracle, progress)[0]


def judged(oracle: Oracle, progress: Callable[[str], None] | None = None) -> tuple[FloorSet, Judgement]:
    """The floors of a bundle for this machine, and whether the oracle and the reference agree by them.

    The floors are those kept with the bundle where they were measured on such a machine, or else pooled with this
    machine's own. These are kept in the cache, but for those of a run in which oracle and reference disagree: what is
    wrong there is in them.

    Raises ParityError when kept floors are no such thing or of another capture, or the reference cannot run.
    """
    kept = read_floors(oracle.bundle.path / FILE, oracle)
    if kept is not None and all(machine() in floors.machines for floors in kept.values()):
        floors = carrying(oracle, kept)
        return floors, judge(oracle, floors)
    place, mine = cache_folder() / f"{_key(oracle)}.safetensors", None
    with suppress(ParityError):
        # What a cache cannot give is measured again.
        mine = read_floors(place, oracle)
    if mine is None and progress is not None:
        _say_unless_kept(place, progress)
    own = measure(oracle, progress) if mine is None else mine
    floors = carrying(oracle, own if kept is None else {kind: pooled([kept[kind], own[kind]]) for kind in KINDS})
    judgement = judge(oracle, floors)
    if mine is None and judgement.agree:
        with suppress(ParityError):
            write_floors(place, oracle, own)
    return floors, judgement


def _say_unless_kept(place: Path, progress: Callable[[str], None]) -> None:
    try:
        with folder_beside(place):
            pass
    except OSError as error:
        progress(f"{FLOORS} cannot be kept in {place.parent} ({error.strerror}): name a folder in {CACHE}")


def cache_folder() -> Path:
    """Where floors of this machine are kept."""
    if chosen := os.environ.get(CACHE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lance-parity"


def write_floors(path: Path, oracle: Oracle, floors: FloorSet) -> None:
    """Write floors, whole or not at all; raises ParityError where that fails."""
    arrays = {f"{kind}_{table}": _packed(getattr(each, table)) for kind, each in floors.items() for table in _TABLES}
    arrays["upstream"] = _packed(floors[FREE].upstream)
    facts_kept = {
        "format": _FORMAT,
        "capture_sha256": _capture_sum(oracle.bundle.manifest),
        # The names follow from the bundle, and would fill most of the file.
        "names_sha256": {kind: _names_sum(each.levels) for kind, each in floors.items()},
        "variants": {kind: each.variants for kind, each in floors.items()},
        "machines": {kind: each.machines for kind, each in floors.items()},
        "machine": facts(),
        "torch": torch.__version__,
        "arrays_sha256": _arrays_sum(arrays),
    }
    # One entry: safetensors writes several in no order, and the same floors are to make the same bytes.
    write_atomically(path, save(arrays, {_FACTS: json.dumps(facts_kept)}))


def read_floors(path: Path, oracle: Oracle) -> FloorSet | None:
    """The floors in a file, None where there is none.

    Raises FloorsRefused for a file that is damaged, changed, of another format, of another capture or of other taps, or
    holds what no rounding does.
    """
    if not os.path.lexists(path):
        return None
    remedy = f"remove {path.name}, or measure it again with lance-parity floors"
    if not path.is_file():
        raise FloorsRefused(f"{path} is no file: {remedy}")
    try:
        with safe_open(path, framework="np") as file:
            kept = dict(json.loads((file.metadata() or {}).get(_FACTS, "{}")))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no mapping
        if kept.get("format") != _FORMAT:
            raise FloorsRefused(f"{path} has format {kept.get('format')!r}, not {_FORMAT!r}: {remedy}")
        if kept["capture_sha256"] != _capture_sum(oracle.bundle.manifest):
            other = _other_capture(oracle, kept["capture_sha256"])
            raise FloorsRefused(f"{path} holds the floors of another capture than the bundle's: {other}, or {remedy}")
        if kept["arrays_sha256"] != _arrays_sum(arrays):
            raise FloorsRefused(f"{path} holds other numbers than were measured: {remedy}")
        floors, wanted = {}, _names(oracle)
        for kind, names in wanted.items():
            if kept["names_sha256"][kind] != _names_sum(names):
                raise FloorsRefused(f"{path} holds the floors of other taps than the bundle's: {remedy}")
            tables = [dict(zip(names, _unpacked(arrays[f"{kind}_{t}"]), strict=True)) for t in _TABLES]
            # Upstream's taps come first, and those of logits have no distance from its own.
            distances = _unpacked(arrays["upstream"]) if kind == FREE else []
            own = dict(zip(names[: len(distances)], distances, strict=True))
            variants, machines = (tuple(kept[key][kind]) for key in ("variants", "machines"))
            floors[kind] = Floors(*tables, variants, machines, own)
            for name, level in floors[kind].levels.items():
                if not 0 <= level <= _LARGEST[oracle.bundle.dtype]:
                    raise FloorsRefused(f"{path} says that rounding moves {name} by {level:g}: {remedy}")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise FloorsRefused(f"{path} is not a complete file of floors ({error}): {remedy}") from None
    return floors


def _names(oracle: Oracle) -> dict[str, list[str]]:
    """The taps that have floors, by kind, in the order in which they are measured."""
    upstream = floats_of(oracle.bundle.expected)
    logits = floats_of(oracle.bundle.expected | logits_of(oracle.own))
    return dict(zip(KINDS, (floats_of(oracle.taps), upstream, logits), strict=True))


def _packed(values: Mapping[str, float]) -> np.ndarray:
    """Binary logarithms in half precision: good to one part in a hundred, in half the room."""
    with np.errstate(divide="ignore"):
        return np.log2(np.array(list(values.values()), np.float32)).astype(np.float16)


def _unpacked(logarithms: np.ndarray) -> list[float]:
    if logarithms.ndim != 1 or logarithms.dtype != np.float16:
        raise ValueError(f"a table is {logarithms.dtype} of shape {list(logarithms.shape)}")
    return np.exp2(logarithms.astype(np.float32)).tolist()


def _key(oracle: Oracle) -> str:
    """What a measurement belongs to: the capture, the checkpoint, the machine and the way to measure."""
    bundle = oracle.bundle
    capture = [sha256(path) for path in sorted(bundle.path.glob("*.safetensors")) if path.name != FILE]
    capture += [_capture_sum(bundle.manifest), definition().checkpoint_sum(bundle), _names_sum(oracle.taps)]
    return hashlib.sha256("\n".join([_FORMAT, *capture, machine()]).encode()).hexdigest()[:32]


def _capture_sum(manifest: Mapping[str, Any]) -> str:
    """What a bundle was asked for and holds, whatever the values of its taps: floors do not hang on those."""
    kept = [manifest[key] for key in ("request", "checkpoint", "variant", "taps")]
    kept += [manifest["source"][key] for key in ("entry", "dtype")]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _other_capture(oracle: Oracle, wanted: str) -> str:
    """What differs from the capture that floors were measured of, told by trying what may have been changed."""
    bundle, manifest = oracle.bundle, oracle.bundle.manifest
    root, source, taps = bundle.path.parent, manifest["source"], manifest["taps"]
    for path in sorted(root.glob("*/manifest.json")):
        with suppress(ParityError, KeyError, TypeError):
            if path.parent != bundle.path and _capture_sum(read_json(path)) == wanted:
                return f"it is bundle {path.parent.name}'s: copy this bundle's own there"
    folders = {"checkpoint": root, "variant": bundle.checkpoint}
    named = [(key, each.name) for key, folder in folders.items() for each in folder.iterdir()]
    for key, value in named:
        if _capture_sum(manifest | {key: value}) == wanted:
            return f"{key} is {manifest[key]} and was {value}: restore it in manifest.json"
    for key, values in (("entry", ENTRIES), ("dtype", DTYPES)):
        for value in values:
            if _capture_sum(manifest | {"source": source | {key: value}}) == wanted:
                return f"{key} is {source[key]} and was {value}: restore it in manifest.json"

    def in_order(entries: Iterable[dict[str, Any]]) -> dict[str, Any]:
        return manifest | {"taps": sorted(entries, key=lambda entry: entry["name"])}

    if _capture_sum(in_order(taps)) == wanted:
        return "the taps are listed in another order: sort them by name in manifest.json"
    for name, tap in oracle.own.items():
        lost = {"name": name, "shape": list(tap.shape), "dtype": tap.dtype}
        if name not in bundle.expected and _capture_sum(in_order([*taps, lost])) == wanted:
            return f"tap {name} is missing: copy manifest.json and taps.safetensors again"
    return "restore the request and the taps in manifest.json if these were changed"


def _names_sum(taps: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(taps).encode()).hexdigest()


def _arrays_sum(arrays: Mapping[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(name.encode() + str(arrays[name].dtype).encode() + arrays[name].tobytes())
    return found.hexdigest()
