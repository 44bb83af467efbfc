"""The sketches of a bundle of the level "sketch", as a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parity.errors import ParityError
from parity.tensors.recording import Tap, open_tensors, write_tensors
from parity.tensors.sketch import Sketch, unpacked

FILE = "sketches.safetensors"
WHOLE, SKETCH = "whole", "sketch"
LEVELS = (WHOLE, SKETCH)
"""Levels of a bundle: every tap whole, or a sketch of what is larger than its sketch."""


def check_level(level: str, whole: Sequence[str]) -> None:
    """Raise ParityError for a level that there is not, and for patterns of what to keep whole where everything is."""
    if level not in LEVELS:
        raise ParityError(f"level {level!r} is not one of {', '.join(LEVELS)}")
    if whole and level != SKETCH:
        raise ParityError(f"every tap is whole at level {level}: leave --whole out, or record at level {SKETCH}")


def write_sketches(path: Path, sketches: Mapping[str, Sketch]) -> None:
    """Write sketches to a safetensors file, whole or not at all; raises ParityError."""
    write_tensors(path, {name: Tap(sketch.packed(), "float32") for name, sketch in sketches.items()})


def read_sketches(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Sketch]:
    """The sketches of a bundle, none at another level; raises ParityError for what is missing or does not fit."""
    level = manifest.get("level", WHOLE)
    if level not in LEVELS:
        raise ParityError(f"bundle {folder.name} has level {level!r}, not one of {', '.join(LEVELS)}")
    if level != SKETCH:
        return {}
    sketches = {}
    with open_tensors(folder / FILE) as file:
        entries = {str(e.get("name")): e for e in manifest["taps"] if isinstance(e, dict) and "groups" in e}
        odd = sorted(set(file) ^ set(entries))
        if odd:
            raise ParityError(
                f"bundle {folder.name}: its manifest or its sketches lack {odd[0]}: copy the bundle again"
            )
        for name, entry in entries.items():
            try:
                runs = tuple((str(label), int(count)) for label, count in entry["groups"])
                sketches[name] = unpacked(file[name].array, entry["dtype"], tuple(entry["shape"]), runs)
            except (KeyError, OverflowError, TypeError, ValueError) as error:
                raise ParityError(f"bundle {folder.name}: the sketch of {name} is damaged ({error})") from None
    return sketches


def listing(sketches: Mapping[str, Sketch]) -> list[dict[str, Any]]:
    """Sketches as a manifest lists them."""
    return [
        {"name": name, "shape": list(sketch.shape), "dtype": sketch.dtype, "groups": [list(run) for run in sketch.runs]}
        for name, sketch in sketches.items()
    ]
