"""Runs that can be compared with each other, whatever holds them: a bundle, a file, an implementation, arrays."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parity.bundle.reading import read_bundle, verify_checksums
from parity.bundle.store import read_manifest
from parity.comparison import check
from parity.errors import ParityError
from parity.lance.record import NUMERICS
from parity.ports.implementations import IMPLEMENTATIONS
from parity.tensors.recording import Recording, Tap, TensorFile, open_tensors
from parity.tensors.sketch import Sketch
from parity.tensors.sketch_file import read_sketches

_INT32 = np.iinfo(np.int32)


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
        numerics: its policy, where that is known.
        replay: what an implementation computed, None for other runs.
    """

    label: str
    taps: Taps
    path: Path | None = None
    bundle: bool = False
    numerics: str | None = None
    replay: check.Run | None = None


Given = str | PathLike | Mapping[str, Any]
"""What names a run: see `opened`."""


@contextmanager
def opened(
    given: Given, label: str = "", like: Path | None = None, progress: Callable[[str], None] | None = None
) -> Iterator[Source]:
    """Open a run.

    Args:
        given: a mapping of names to arrays (NumPy, PyTorch, MLX) or taps, or one of these:
            `PATH` of a bundle, of a folder with taps.safetensors, or of a safetensors file;
            `PATH@IMPL`, a bundle's request replayed by an implementation under the bundle's numerics;
            `PATH@IMPL:NUMERICS`, under others.
        label: what to call a mapping.
        like: the bundle that `@IMPL` without a path is about.
        progress: told the name of each call of a replay.

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
        yield _replayed(text, Path(place) if place else like, what, progress)
        return
    with _stored(Path(text)) as source:
        yield source


def tap_of(value: Any, name: str = "array") -> Tap | Sketch:
    """Hold an array of NumPy, PyTorch or MLX as a tap; integers become int32.

    Raises ParityError for a dtype that would lose something.
    """
    if isinstance(value, Tap | Sketch):
        return value
    dtype = dtype_of(value)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if dtype == "bfloat16" else value).numpy()
    elif type(value).__module__.startswith("mlx."):
        import mlx.core as mx

        value = np.array(value.astype(mx.float32) if dtype == "bfloat16" else value)
    array = np.asarray(value)
    if dtype == "bfloat16":
        return Tap(np.ascontiguousarray(array, np.float32), "bfloat16")
    if array.dtype == np.float32:
        return Tap(array, "float32")
    if array.dtype.kind not in "iub":
        raise ParityError(f"{name} is {array.dtype}: cast it to float32, bfloat16 or int32, which can be compared")
    if array.size and not (_INT32.min <= array.min() and array.max() <= _INT32.max):
        raise ParityError(f"{name} holds integers that int32 cannot: they cannot be compared")
    return Tap(array.astype(np.int32), "int32")


def dtype_of(value: Any) -> str:
    """The name of an array's or a tap's dtype, without its library's; integers are held as int32 whatever they were."""
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    name = str(dtype).rpartition(".")[2]
    return "int32" if name.startswith(("int", "uint", "bool")) else name


@contextmanager
def _stored(path: Path) -> Iterator[Source]:
    if path.is_dir() and (path / "manifest.json").is_file():
        manifest = read_manifest(path)
        verify_checksums(path.resolve().parent, [path.resolve()])
        with ExitStack() as stack:
            inputs, taps = (stack.enter_context(open_tensors(path / f"{kind}.safetensors")) for kind in _PARTS)
            places = {f"inputs/{name}": (inputs, name) for name, dtype in inputs.dtypes.items() if dtype == "int32"}
            places |= {name: (taps, name) for name in taps}
            sketches = read_sketches(path, manifest)
            places |= {name: (sketches, name) for name in sketches}
            listed = {entry.get("name") for entry in manifest["taps"] if isinstance(entry, dict)}
            if listed != set(taps) | set(sketches):
                odd = min(map(str, listed ^ (set(taps) | set(sketches))))
                raise ParityError(f"bundle {path.name}: its manifest or its tensors lack {odd}: copy the bundle again")
            numerics = manifest["source"].get("dtype")
            yield Source(str(path), Taps(places), path, True, numerics if numerics in NUMERICS else None)
        return
    file = path / "taps.safetensors" if path.is_dir() else path
    if not file.is_file():
        lacks = "does not exist" if not path.exists() else "is no bundle and holds no taps.safetensors"
        raise ParityError(f"{path} {lacks}: name a bundle, a safetensors file, or BUNDLE@mlx or BUNDLE@reference")
    with open_tensors(file) as taps:
        yield Source(str(path), Taps({name: (taps, name) for name in taps}), path)


_PARTS = ("inputs", "taps")


def _replayed(text: str, path: Path | None, what: str, progress: Callable[[str], None] | None) -> Source:
    name, _, numerics = what.partition(":")
    if name not in IMPLEMENTATIONS:
        raise ParityError(f"{text}: {name!r} is not an implementation; there are {', '.join(IMPLEMENTATIONS)}")
    if ":" in what and numerics not in NUMERICS:
        raise ParityError(f"{text}: numerics {numerics!r} is not one of {', '.join(NUMERICS)}")
    if path is None:
        raise ParityError(f"{text}: which bundle? Write BUNDLE{text}")
    impl = IMPLEMENTATIONS[name]()
    bundle = read_bundle(path)
    if numerics in ("", bundle.dtype):
        replay = check.record_bundle(path, impl, progress)
    else:
        source = bundle.manifest["source"] | {"dtype": numerics}
        bundle = replace(bundle, manifest=bundle.manifest | {"source": source})
        replay = check.Run(bundle, impl.record(bundle, progress), impl)
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
