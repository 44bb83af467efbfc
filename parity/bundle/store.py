"""Bundles that are kept: what lies in a folder, and the checksums that tell whether it is still what it was."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity.bundle.reading import (
    CHECKSUMS,
    FILES,
    FORMAT,
    OWN,
    find_bundles,
    read_json,
    read_listing,
    require_folder,
    sha256,
)
from parity.errors import ParityError, printable
from parity.files import write_atomically
from parity.tensors.sketch_file import FILE as SKETCHES

FLOORS = "floors.*"
"""Files of a bundle that hold what rounding alone does to it."""
INTACT, DAMAGED, NONE = "ok", "damaged", "none"


@dataclass(frozen=True)
class Checksums:
    """The files of a bundle against its checksums.

    Attributes:
        state: INTACT, DAMAGED, or NONE where nothing lists the files.
        wrong: the files that are missing or differ, relative to the folder that holds the bundle.
        checked: how many files were compared.
    """

    state: str
    wrong: tuple[str, ...] = ()
    checked: int = 0


@dataclass(frozen=True)
class Stored:
    """One bundle as its manifest describes it; `problem` says in a line why it cannot be used, None where it can."""

    path: Path
    task: str = ""
    dtype: str = ""
    entry: str = ""
    taps: int = 0
    size: int = 0
    source: str = ""
    checkpoint: str = ""
    checksums: str = NONE
    floors: bool = False
    problem: str | None = None


def list_bundles(folders: Sequence[Path]) -> list[Stored]:
    """Describe every bundle among and directly in `folders`; raises ParityError for a folder without any."""
    return [describe(path) for path in whole_bundles(folders)]


def whole_bundles(folders: Sequence[Path]) -> list[Path]:
    """Return the bundles among and directly in `folders`, but for what an interrupted recording left behind.

    Raises ParityError where there is none.
    """
    found = [path for path in find_bundles(folders) if not path.name.startswith(".")]
    if not found:
        raise ParityError(f"{folders[0]} holds no oracle bundle: name a folder of bundles or one bundle")
    return found


def describe(path: Path) -> Stored:
    """Describe one bundle from its manifest and its files' checksums, without reading any tensor."""
    files = [file for file in path.iterdir() if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    try:
        manifest = read_manifest(path)
        origin, request = manifest["source"], manifest["request"]
        sums = checksums(path, manifest)
    except ParityError as error:
        return Stored(path, size=size, problem=str(error))
    checkpoint = str(manifest.get("checkpoint"))
    problem = next((f"{name} is missing" for name in FILES if not (path / name).is_file()), None)
    if problem is None and not os.path.isdir(path.resolve().parent / checkpoint):
        problem = f"checkpoint {checkpoint} is missing"
    if problem is None and sums.wrong:
        problem = f"{sums.wrong[0]} does not match its checksum"
    task, dtype, entry = (
        printable(str(value), 40) for value in (request.get("task"), origin.get("dtype"), origin.get("entry"))
    )
    commit = str(origin.get("commit") or "")
    source = f"{origin.get('implementation')}" + (f" {commit[:7]}" if commit else "")
    return Stored(
        path=path,
        task=task,
        dtype=dtype,
        entry=entry,
        taps=len(manifest["taps"]),
        size=size,
        source=printable(source, 40),
        checkpoint=printable(checkpoint, 40),
        checksums=sums.state,
        floors=any(path.glob(FLOORS)),
        problem=problem and printable(problem),
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the bundle at `path`; raises ParityError where it is none."""
    require_folder(path)
    if not (path / "manifest.json").is_file():
        raise ParityError(f"bundle {path.name} has no manifest.json: copy the bundle again")
    manifest = read_json(path / "manifest.json")
    if manifest.get("format") != FORMAT:
        what = f"{path.name}/manifest.json has format {manifest.get('format')!r}"
        raise ParityError(f"{what}, not {FORMAT!r}: capture the bundle again")
    for key, kind in (("source", dict), ("request", dict), ("taps", list)):
        if not isinstance(manifest.get(key), kind):
            raise ParityError(f"{path.name}/manifest.json lacks {key!r} or holds no {kind.__name__} there: restore it")
    return manifest


def checksums(path: Path, manifest: dict[str, Any]) -> Checksums:
    """Compare a bundle's files with MANIFEST.json beside it, and with the checksums in its own manifest."""
    path = path.resolve()
    expected: dict[str, Any] = {}
    if isinstance(manifest.get(OWN), dict):
        expected |= {f"{path.name}/{name}": entry for name, entry in manifest[OWN].items()}
    expected |= {name: e for name, e in listed(path.parent).items() if name.startswith(f"{path.name}/")}
    return compare_files(path.parent, expected)


def listed(root: Path) -> dict[str, Any]:
    """Return the entries of MANIFEST.json in a folder, none where there is no such file; raises ParityError."""
    document = read_listing(root)
    return {} if document is None else document["files"]


def compare_files(root: Path, expected: dict[str, Any]) -> Checksums:
    """Compare files below `root` with their entries, `sha256` each; raises ParityError for a name outside `root`."""
    wrong = []
    for name, entry in sorted(expected.items()):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ParityError(f"{name!r} in the checksums leaves the folder {root}: restore or remove them")
        file = root / name
        if not isinstance(entry, dict) or not os.path.isfile(file) or sha256(file) != entry.get("sha256"):
            wrong.append(name)
    return Checksums(DAMAGED if wrong else INTACT if expected else NONE, tuple(wrong), len(expected))


def entry_of(path: Path) -> dict[str, Any]:
    """Return what a list of checksums holds of a file."""
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def seal(path: Path) -> None:
    """Write the checksums of a bundle's tensors into its manifest."""
    manifest = read_json(path / "manifest.json")
    files = (*FILES, SKETCHES) if (path / SKETCHES).is_file() else FILES
    manifest[OWN] = {name: entry_of(path / name) for name in files if name != "manifest.json"}
    _write_json(path / "manifest.json", manifest)


def relist(file: Path) -> None:
    """Write the checksum of a bundle's file that was made anew into MANIFEST.json beside the bundle, if that lists it.

    Raises ParityError for a MANIFEST.json that is none.
    """
    file = file.resolve()
    root, name = file.parents[1], f"{file.parent.name}/{file.name}"
    document = read_listing(root)
    if document is None or name not in document["files"]:
        return
    document["files"][name] = entry_of(file)
    _write_json(root / CHECKSUMS, document)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())


def sizes(count: int) -> str:
    """Return a number of bytes in words."""
    for unit, digits in (("B", 4), ("kB", 3), ("MB", 3)):
        if count < 1000:
            return f"{count:.{digits}g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
