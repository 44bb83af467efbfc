"""Runs that can be compared with each other, whatever holds them: a bundle, a file, an implementation, arrays."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np

from parity.bundle.reading import read_bundle, verify_checksums
from parity.bundle.store import read_manifest
from parity.comparison import check
from parity.errors import ParityError
from parity.ports.loading import port_loader
from parity.tensors.arrays import dtype_of, tap_of
from parity.tensors.recording import Recording, Tap, TensorFile, open_tensors
from parity.tensors.rounding import ULP
from parity.tensors.sketch import Sketch
from parity.tensors.sketch_file import read_sketches

NUMERICS = tuple(ULP)
"""Policies that a run can be asked for."""
# After the @: a port, and numerics behind it.
_SPEC = re.compile(r"(?P<name>.*\.py:[^:]*|[^:]*)(:(?P<numerics>.*))?", re.DOTALL)


class Taps(Mapping[str, Tap | Sketch]):
    """Taps by name, read from where they are when they are asked for."""

    def __init__(self, places: Mapping[str, tuple[Mapping[str, Any], str]]) -> None:
        """`places`: for each name the mapping that holds its tap or array, and its name there."""
        self._places = places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Tap | Sketch:
        """Raises ParityError for an array that no tap can hold."""
        holder, inner = self._places[name]
        return tap_of(holder[inner], name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tap, which is not read for it."""
        holder, inner = self._places[name]
        if isinstance(holder, TensorFile):
            return holder.shapes[inner]
        value = holder[inner]
        return tuple(value.shape if isinstance(value, Tap | Sketch) else np.shape(value))

    def dtype(self, name: str) -> str:
        """The dtype of a tap, as whatever holds it spells it; it is not read for that."""
        holder, inner = self._places[name]
        return holder.dtypes[inner] if isinstance(holder, TensorFile) else dtype_of(holder[inner])


@dataclass(frozen=True)
class Source:
    """A run to compare.

    Attributes:
        label: what to call it.
        taps: its taps; integers of the sequence are called `inputs/...`.
        path: the bundle's or the file's, None for arrays.
        bundle: whether it is what a bundle holds.
        file: whether it is a file of taps, which somebody's run wrote.
        numerics: its policy, where that is known.
        replay: what an implementation computed, None for other runs.
    """

    label: str
    taps: Taps
    path: Path | None = None
    bundle: bool = False
    file: bool = False
    numerics: str | None = None
    replay: check.Run | None = None


@dataclass(frozen=True)
class Recorded:
    """Stands for the port of a run of which only the taps are there."""

    name: str
    partial = False

    def versions(self) -> dict[str, str]:
        """Nothing is known of what computed them."""
        return {}


Given = str | PathLike | Mapping[str, Any]
"""What names a run: see `opened`."""


@contextmanager
def opened(
    given: Given,
    label: str = "",
    like: Path | None = None,
    progress: Callable[[str], None] | None = None,
    python: Path | None = None,
) -> Iterator[Source]:
    """Open a run.

    Args:
        given: a mapping of names to arrays (NumPy, PyTorch, MLX) or taps, or one of these:
            `PATH` of a bundle, of a folder with taps.safetensors, or of a safetensors file;
            `PATH@IMPL`, a bundle's request replayed by a port (mlx, reference, FILE.py:NAME) under its numerics;
            `PATH@IMPL:NUMERICS`, under others.
        label: what to call a mapping.
        like: the bundle that `@IMPL` without a path is about.
        progress: told the name of each call of a replay.
        python: the interpreter of a port from a file.

    Raises ParityError for what cannot be opened.
    """
    if isinstance(given, Mapping):
        yield Source(label, Taps({str(name): (given, name) for name in given}))
        return
    if not isinstance(given, str | PathLike):
        raise ParityError(f"{type(given).__name__} is no run: give a path, or names with their arrays")
    text = fspath(given)
    place, at, what = (text, "", "") if Path(text).exists() else text.rpartition("@")
    if at:
        yield _replayed(text, Path(place) if place else like, what, progress, python)
        return
    with _stored(Path(text)) as source:
        yield source


@contextmanager
def _stored(path: Path) -> Iterator[Source]:
    if path.is_dir() and (path / "manifest.json").is_file():
        manifest = read_manifest(path)
        verify_checksums(path.resolve(), manifest)
        with ExitStack() as stack:
            inputs, taps = (stack.enter_context(open_tensors(path / f"{kind}.safetensors")) for kind in _PARTS)
            places = {f"inputs/{name}": (inputs, name) for name, dtype in inputs.dtypes.items() if dtype == "int32"}
            places |= {name: (taps, name) for name in taps}
            sketches = read_sketches(path, manifest)
            places |= {name: (sketches, name) for name in sketches}
            listed = {str(entry.get("name")) for entry in manifest["taps"] if isinstance(entry, dict)}
            if listed != set(taps) | set(sketches):
                odd = min(listed ^ (set(taps) | set(sketches)))
                raise ParityError(f"bundle {path.name}: its manifest or its tensors lack {odd}: copy the bundle again")
            numerics = manifest["source"].get("dtype")
            yield Source(str(path), Taps(places), path, True, numerics=numerics if numerics in NUMERICS else None)
        return
    file = path / "taps.safetensors" if path.is_dir() else path
    if not file.is_file():
        lacks = "does not exist" if not path.exists() else "is no bundle and holds no taps.safetensors"
        raise ParityError(f"{path} {lacks}: name a bundle, a safetensors file, or BUNDLE@mlx or BUNDLE@reference")
    with open_tensors(file) as taps:
        yield Source(str(path), Taps({name: (taps, name) for name in taps}), path, file=True)


_PARTS = ("inputs", "taps")


def _replayed(
    text: str, path: Path | None, what: str, progress: Callable[[str], None] | None, python: Path | None
) -> Source:
    named = _SPEC.fullmatch(what)
    name, numerics = named["name"], named["numerics"]
    load = port_loader(name, python if ".py:" in name else None)
    if numerics not in (None, *NUMERICS):
        raise ParityError(f"{text}: numerics {numerics!r} is not one of {', '.join(NUMERICS)}")
    if path is None:
        raise ParityError(f"{text}: which bundle? Write BUNDLE{text}")
    bundle = read_bundle(path)
    if numerics in (None, bundle.dtype):
        replay = check.record_bundle(path, load, progress)
    else:
        source = bundle.manifest["source"] | {"dtype": numerics}
        bundle = replace(bundle, manifest=bundle.manifest | {"source": source})
        port = load(bundle)
        replay = check.Run(bundle, check.replayed(port, bundle, progress), port)
    recording: Recording = replay.recording
    places = {}
    for tap in recording:
        # The integers of the sequence have the names that they have in inputs.safetensors.
        own = tap in bundle.expected or tap.startswith(("sampler.", "velocity_call"))
        places[tap if own else f"inputs/{tap}"] = (recording, tap)
    return Source(
        label=f"{path}@{name}:{bundle.dtype}",
        taps=Taps(places),
        path=path,
        numerics=bundle.dtype,
        replay=replay,
    )
