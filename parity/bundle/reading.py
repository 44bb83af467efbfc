"""Oracle bundles: a request, what upstream was given, and the taps it computed; every claim is checked on reading."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from parity.bundle.checks import CONFIG, WEIGHTS, check_finite, check_inputs, check_listing, check_sums
from parity.errors import ParityError
from parity.files import folder_beside
from parity.model import definition
from parity.tensors.names import TapName
from parity.tensors.recording import DTYPES, Recording, Tap, open_tensors, read_tensors, write_tensors
from parity.tensors.sketch import Sketch
from parity.tensors.sketch_file import FILE, SKETCH, listing, read_sketches, write_sketches

FORMAT = "lance-oracle/1"
CHECKSUMS = "MANIFEST.json"
CHECKSUMS_FORMAT = "lance-oracles/1"
ENTRIES = ("kv_cache", "full_sequence")
OWN = "files"
"""Key of a manifest under which a bundle lists the checksums of its own tensors."""
FILES = ("manifest.json", "inputs.safetensors", "taps.safetensors")


@dataclass(frozen=True)
class Bundle:
    """One oracle: `request` is what was asked for, `inputs` what the model was given, `taps` what it computed.

    Of taps that a bundle of the level "sketch" does not hold whole, `sketches` holds sketches.
    """

    path: Path
    manifest: dict[str, Any]
    inputs: Recording
    taps: Recording
    checkpoint: Path
    sketches: dict[str, Sketch] = field(default_factory=dict)

    @property
    def expected(self) -> dict[str, Tap | Sketch]:
        """All taps: those that are whole, and the sketches of the others."""
        return self.taps | self.sketches if self.sketches else self.taps

    @property
    def name(self) -> str:
        """The name of the bundle's folder."""
        return self.path.name

    @property
    def request(self) -> dict[str, Any]:
        """The request under upstream's key names."""
        return self.manifest["request"]

    @property
    def task(self) -> str:
        """The launcher task, such as t2i."""
        return self.request["task"]

    @property
    def entry(self) -> str:
        """Which of upstream's two sampling functions ran: kv_cache or full_sequence."""
        return self.manifest["source"]["entry"]

    @property
    def dtype(self) -> str:
        """The numerics policy of the run: float32 or bfloat16."""
        return self.manifest["source"]["dtype"]

    @property
    def variant(self) -> str:
        """The folder of the LLM within the checkpoint."""
        return self.manifest["variant"]

    @cached_property
    def timesteps(self) -> list[float]:
        """t of the tokens that are denoised at the start of every step, as captured."""
        taps = (self.taps.get(f"sampler.timestep{step}") for step in range(self.request.get("num_steps", 0)))
        return [float(tap.array.max()) for tap in taps if tap is not None and tap.array.size]

    @cached_property
    def guided(self) -> list[bool]:
        """Whether the unconditional arm runs, for every step (bytedance/Lance modeling/lance/lance.py)."""
        low, high = self.request.get("cfg_interval", (0.0, 1.0))
        # Upstream compares in float32, t being a tensor.
        low, high = np.float32(low), np.float32(high)
        return [bool(self.request.get("cfg_text_scale", 1.0) > 1.0 and low < t <= high) for t in self.timesteps]

    def locate(self, name: str) -> TapName:
        """Return the parsed tap name with what only this run's schedule can tell."""
        return definition().locate(name, self.guided)


def read_bundle(path: Path) -> Bundle:
    """Read and validate one bundle folder; raises ParityError in one line that names what is wrong."""
    path, manifest, checkpoint = _opened(path)
    verify_checksums(path, manifest, checkpoint)
    taps = read_tensors(path / "taps.safetensors")
    bundle = _bundle(path, manifest, checkpoint, taps, {name: (tap.shape, tap.dtype) for name, tap in taps.items()})
    for name, tap in bundle.expected.items():
        check_finite(tap, f"tap {name} of bundle {path.name}")
    return bundle


@contextmanager
def open_bundle(path: Path, checkpoint: Path | None = None) -> Iterator[Bundle]:
    """Validate one bundle folder as `read_bundle` does but for checksums and the values of its taps, which are read
    when they are asked for, and leave its sketches out; raises ParityError.

    `checkpoint` takes the place of the one beside the bundle.
    """
    path, manifest, checkpoint = _opened(path, checkpoint)
    with open_tensors(path / "taps.safetensors") as taps:
        held = {name: (taps.shapes[name], taps.dtypes[name]) for name in taps}
        yield replace(_bundle(path, manifest, checkpoint, taps, held), sketches={})


def require_folder(path: Path) -> None:
    """Raise ParityError for what cannot be a bundle, since it is no folder."""
    if not path.is_dir():
        what = "is no folder" if os.path.lexists(path) else "does not exist"
        raise ParityError(f"{path} {what}: name the folder of a bundle, which holds {', '.join(FILES)}")


def _opened(path: Path, checkpoint: Path | None = None) -> tuple[Path, dict[str, Any], Path]:
    """A bundle's resolved folder, its manifest and its checkpoint."""
    require_folder(path)
    path = path.resolve()
    root = path.parent
    for name in FILES:
        _inside(path / name, root, f"{path.name}/{name}")
        if not (path / name).is_file():
            if held := sorted(p.parent.name for p in path.glob("*/manifest.json")):
                raise ParityError(f"{path} holds {len(held)} bundles: name one of them, such as {path / held[0]}")
            raise ParityError(f"bundle {path.name} has no {name}: copy the bundle again")
    manifest = _read_manifest(path / "manifest.json")
    # Plain names cannot leave the folder; a link that its owner put there may, as the files of a hub's cache do.
    checkpoint = checkpoint or root / _plain(manifest, "checkpoint", path.name)
    variant = checkpoint / _plain(manifest, "variant", path.name)
    if not os.path.isdir(variant):
        raise ParityError(f"bundle {path.name} names the checkpoint {variant}, which does not exist: put it there")
    return path, manifest, checkpoint


def _bundle(
    path: Path, manifest: dict[str, Any], checkpoint: Path, taps: Mapping[str, Tap], held: dict[str, tuple]
) -> Bundle:
    inputs, sketches = read_tensors(path / "inputs.safetensors"), read_sketches(path, manifest)
    check_listing(manifest["taps"], held, sketches, path.name)
    check_inputs(inputs, read_json(checkpoint / manifest["variant"] / "llm_config.json").get("vocab_size"), path.name)
    return Bundle(path, manifest, inputs, taps, checkpoint, sketches)


def write_bundle(
    path: Path,
    manifest: dict[str, Any],
    inputs: Recording,
    taps: Recording,
    sketches: Mapping[str, Sketch] | None = None,
) -> None:
    """Write a bundle folder, replacing one of the same name, with the list of taps filled in from what it is given.

    `manifest` holds the other keys: source, checkpoint, variant, request. With `sketches`, also with none of them, the
    bundle is of the level "sketch". Raises ParityError when that fails.
    """
    listed = [{"name": n, "shape": list(t.shape), "dtype": t.dtype} for n, t in taps.items()]
    complete = {**manifest, "format": FORMAT, "name": path.name}
    if sketches is not None:
        complete["level"] = SKETCH
        listed += listing(sketches)
    complete["taps"] = sorted(listed, key=lambda entry: entry["name"])
    try:
        with folder_beside(path) as beside:
            (beside / "manifest.json").write_text(json.dumps(complete, indent=1), encoding="utf-8")
            write_tensors(beside / "inputs.safetensors", inputs)
            write_tensors(beside / "taps.safetensors", taps)
            if sketches is not None:
                write_sketches(beside / FILE, sketches)
            if path.exists():
                shutil.rmtree(path)
            os.replace(beside, path)
    except OSError as error:
        raise ParityError(f"{path} cannot be written: {error.strerror}") from error


def find_bundles(folders: Sequence[Path]) -> list[Path]:
    """Return the bundle folders among and directly in `folders`, in order; raises ParityError where there is none."""
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            what = "is not a folder" if os.path.lexists(folder) else "does not exist"
            raise ParityError(f"{folder} {what}: name a folder of oracle bundles or one bundle")
        # By listing: where file names ignore case, MANIFEST.json of a folder of bundles would pass for manifest.json.
        inside = [folder] if "manifest.json" in {path.name for path in folder.iterdir()} else []
        # A folder that only lacks its manifest is still listed, so that it is reported rather than passed over.
        # What begins with a dot is being written, or was left by a run that was killed.
        folders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        inside = inside or [path for path in folders if any((path / name).exists() for name in FILES)]
        if not inside:
            raise ParityError(f"{folder} holds no oracle bundle: name a folder of bundles or one bundle")
        found += [path for path in inside if path not in found]
    return found


def read_listing(root: Path) -> dict[str, Any] | None:
    """Return MANIFEST.json of a folder of bundles, whose `files` have an entry each; None where there is none.

    Raises ParityError for a file that is none.
    """
    path = root / CHECKSUMS
    if not path.is_file():
        return None
    document = read_json(path)
    if document.get("format") != CHECKSUMS_FORMAT or not isinstance(document.get("files"), dict):
        raise ParityError(f"{path} is not a {CHECKSUMS_FORMAT} file: restore or remove it")
    return document


def verify_checksums(path: Path, manifest: Mapping[str, Any], checkpoint: Path | None = None) -> None:
    """Compare a bundle's files with the checksums in its manifest, and them and those of its checkpoint with the
    MANIFEST.json beside them, as far as there are any; raises ParityError."""
    root, own = path.parent, manifest.get(OWN, {})
    listing = f"{path.name}/manifest.json"
    if not isinstance(own, dict):
        raise ParityError(f"{OWN!r} in {listing} must map names to checksums: copy the bundle again")
    expected = [(f"{path.name}/{name}", entry, listing) for name, entry in own.items()]
    prefixes = tuple(f"{folder.relative_to(root).as_posix()}/" for folder in (path, checkpoint) if folder)
    listed = (read_listing(root) or {"files": {}})["files"]
    expected += [(name, entry, CHECKSUMS) for name, entry in listed.items() if name.startswith(prefixes)]
    for name, entry, where in expected:
        if ".." in Path(name).parts:
            raise ParityError(f"{where} entry {name!r} leaves the oracle folder {root}: restore or remove it")
        # pathlib raises for names that no disk takes.
        if not os.path.isfile(root / name):
            raise ParityError(f"{name} is listed in {where} but missing: copy it again")
        if not isinstance(entry, dict) or sha256(root / name) != entry.get("sha256"):
            raise ParityError(f"{name} does not match its checksum in {where}: copy it again")


def sha256(path: Path) -> str:
    """Return the checksum of a file, computed once for as long as it does not change.

    Raises ParityError where it cannot be read.
    """
    try:
        status = path.stat()
        return _sha256(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise ParityError(f"{path} cannot be read: {error.strerror}") from error


@cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    del size, mtime_ns  # they only tell a changed file apart in the cache
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file; raises ParityError for anything else."""
    if path.exists() and not path.is_file():
        raise ParityError(f"{path} is no file: copy it again")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParityError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ParityError(f"{path} is not JSON ({error}): copy it again") from error
    if not isinstance(document, dict):
        raise ParityError(f"{path} must hold a JSON object: copy it again")
    return document


def _inside(path: Path, root: Path, what: str) -> Path:
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ParityError(f"{what} is not a usable path ({error})") from error
    if not resolved.is_relative_to(root):
        raise ParityError(f"{what} leaves the oracle folder {root}: copy what it points to into that folder")
    return resolved


def _plain(manifest: dict[str, Any], key: str, bundle: str) -> str:
    name = manifest[key]
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise ParityError(f"{key} {name!r} of bundle {bundle} leaves the folder: it must be the plain name of a folder")
    return name


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path)
    what = f"{path.parent.name}/manifest.json"
    if manifest.get("format") != FORMAT:
        raise ParityError(f"{what} has format {manifest.get('format')!r}, not {FORMAT!r}: capture the bundle again")
    for key, kind in (("source", dict), ("checkpoint", str), ("variant", str), ("request", dict), ("taps", list)):
        if not isinstance(manifest.get(key), kind):
            raise ParityError(f"{what} lacks {key!r} or holds no {kind.__name__} there: capture the bundle again")
    if manifest["source"].get("entry") not in ENTRIES:
        entry = manifest["source"].get("entry")
        raise ParityError(f"{what} has entry {entry!r}, not one of {', '.join(ENTRIES)}: restore it")
    if manifest["source"].get("dtype") not in ("float32", "bfloat16"):
        raise ParityError(f"{what} has dtype {manifest['source'].get('dtype')!r}, not float32 or bfloat16: restore it")
    definition().check_request(manifest["request"], what)
    for key in (WEIGHTS, CONFIG):
        check_sums(manifest, key, path.parent.name)
    for entry in manifest["taps"]:
        listed = isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("shape"), list)
        if not listed or entry.get("dtype") not in list(DTYPES):
            lacks = "lists a tap without a name, a shape or a known dtype; restore it"
            raise ParityError(f"{what} {lacks}: {entry!r}"[:300])
    return manifest
