#!/usr/bin/env python3
"""Make every fixture that the project makes once more, and compare it byte for byte with the one that is stored.

    python scripts/regenerate_oracles.py [NAME...]

NAME is one of the fixtures below; without any all are made, in a temporary folder. What the captured oracles are
selected from lies in ../shared beside the repository; where that is not there, the fixtures made of it are skipped.
Exit status: 0 all that was made is the same, 1 something differs or is made by no fixture, 2 bad input.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import embed_oracles

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
ORACLES = Path("oracles")
TOKENIZER = Path("tests/data/tokenizer")
# Written by hand.
NOT_MADE = {ORACLES / "README.md"}


class Skipped(Exception):
    """A fixture cannot be made here; the message says why."""


@dataclass(frozen=True)
class Fixture:
    """Files that the project makes.

    Attributes:
        name: what to call it on the command line.
        build: makes the files in a folder, under the paths that they have in the repository (its other argument), and
            returns those paths; raises Skipped.
    """

    name: str
    build: Callable[[Path, Path], list[Path]]


def selection(made: Path, stored: Path) -> list[Path]:
    """What is selected of the captured oracles, with MANIFEST.json, which lists what the project adds as well."""
    if not (SHARED / ORACLES).is_dir():
        raise Skipped("the captured oracles that it is selected from are not here")
    added = embed_oracles.project_made(stored / ORACLES)
    for path in added:
        _copy(stored / ORACLES / path, made / ORACLES / path)
    embed_oracles.embed(SHARED / ORACLES, made / ORACLES)
    return [path for path in _files(made) if path.relative_to(ORACLES) not in added]


def tokenizer(made: Path, stored: Path) -> list[Path]:
    """Qwen2.5-VL's tokenizer files that layouts are tested with."""
    if not (SHARED / "tokenizer").is_dir():
        raise Skipped("the tokenizer that it is copied from is not here")
    for path in (stored / TOKENIZER).iterdir():
        _copy(SHARED / "tokenizer" / path.name, made / TOKENIZER / path.name)
    return _files(made)


def recorded(made: Path, stored: Path) -> list[Path]:
    """Bundles in oracles/ that lance-parity recorded: recorded again, but for when and by which commit."""
    import torch

    from parity.bundle.store import seal
    from parity.lance.record import IMPLEMENTATION, record

    torch.set_num_threads(1)
    paths = []
    for manifest in sorted((stored / ORACLES).glob("[!.]*/manifest.json")):
        before = json.loads(manifest.read_text(encoding="utf-8"))
        if before["source"]["implementation"] != IMPLEMENTATION:
            continue
        request, source = before["request"], before["source"]
        if isinstance(request["spec"], dict):
            spec = request["spec"]
            kinds = zip(spec["interleave_array"], spec["element_dtype_array"], strict=True)
            elements = [part if kind == "text" else str(stored / ORACLES / part) for part, kind in kinds]
            request = request | {"spec": spec | {"interleave_array": elements}}
        bundle = made / ORACLES / manifest.parent.name
        record(bundle, stored / ORACLES / before["checkpoint"], request, source["entry"], source["dtype"])
        after = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        after["source"] = source
        (bundle / "manifest.json").write_text(json.dumps(after), encoding="utf-8")
        seal(bundle)
        paths += [path.relative_to(made) for path in bundle.iterdir()]
    return paths


# To add a fixture, add a line here: a name and a function as `Fixture.build` describes it.
def floors(made: Path, stored: Path) -> list[Path]:
    """What rounding does to every stored bundle, measured again; another processor may round otherwise."""
    import torch

    from parity.bundle.reading import read_bundle
    from parity.oracle.floors import measure
    from parity.oracle.floors_file import FILE, write_floors
    from parity.oracle.machines import settings
    from parity.oracle.oracle import Oracle

    torch.set_num_threads(1)
    paths = []
    for path in sorted((stored / ORACLES).glob(f"[!.]*/{FILE}")):
        oracle = Oracle.of(read_bundle(path.parent))
        name = path.relative_to(stored)
        write_floors(made / name, oracle, measure(oracle, environments=settings()))
        paths.append(name)
    return paths


FIXTURES = (
    Fixture("selection", selection),
    Fixture("tokenizer", tokenizer),
    Fixture("recorded", recorded),
    Fixture("floors", floors),
)


def regenerate(fixture: Fixture, stored: Path) -> tuple[list[Path], list[str]]:
    """Make a fixture; return the paths that were made, and a line for each that is not what is stored."""
    with tempfile.TemporaryDirectory(prefix="regenerate-oracles-") as folder:
        made = Path(folder)
        paths = fixture.build(made, stored)
        return paths, [line for path in paths for line in differences(made / path, stored / path, path)]


def differences(made: Path, stored: Path, name: Path) -> Iterator[str]:
    """Say in a line how a stored file differs from the one that was made; nothing where it does not."""
    if not stored.is_file():
        yield f"{name} is not stored"
        return
    new, old = made.read_bytes(), stored.read_bytes()
    if new == old:
        return
    try:
        why = _why(name, new, old)
    except (ValueError, KeyError, UnicodeError):
        why = None
    if why is None:
        shared = min(len(new), len(old))
        first = next((i for i in range(shared) if new[i] != old[i]), shared)
        why = f"from byte {first} on; {len(old)} bytes stored, {len(new)} made"
    yield f"{name} differs: {why}"


def _why(name: Path, new: bytes, old: bytes) -> str | None:
    """What differs in a file whose format is known; None where only its bytes do."""
    if name.suffix == ".json":
        return _in_json(json.loads(new), json.loads(old), "")
    if name.suffix != ".safetensors":
        return None
    tensors = [_tensors(data) for data in (new, old)]
    if set(tensors[0]) != set(tensors[1]):
        odd = sorted(set(tensors[0]) ^ set(tensors[1]))
        return f"{len(odd)} tensors on one side only, such as {odd[0]}"
    wrong = [key for key, value in tensors[0].items() if value != tensors[1][key]]
    return f"{len(wrong)} of {len(tensors[0])} tensors, such as {min(wrong)}" if wrong else None


def _in_json(new: object, old: object, place: str) -> str | None:
    if isinstance(new, dict) and isinstance(old, dict):
        pairs = [(f"{place}.{key}", new.get(key), old.get(key)) for key in sorted({*new, *old})]
    elif isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        pairs = [(f"{place}[{index}]", a, b) for index, (a, b) in enumerate(zip(new, old, strict=True))]
    elif new != old:
        return f"{place.removeprefix('.')} is {json.dumps(old)[:60]}, made is {json.dumps(new)[:60]}"
    else:
        return None
    return next((why for key, a, b in pairs if (why := _in_json(a, b, key)) is not None), None)


def _tensors(data: bytes) -> dict[str, tuple]:
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def _files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def _copy(source: Path, dest: Path) -> None:
    dest.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, dest)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = {fixture.name: fixture for fixture in FIXTURES}
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"fixtures: {', '.join(known)}; by default all")
    names = parser.parse_args().names
    unknown = sorted(set(names) - set(known))
    if unknown:
        print(f"regenerate_oracles: {unknown[0]!r} is not one of {', '.join(known)}", file=sys.stderr)
        return 2
    made, wrong, complete = set(NOT_MADE), [], not names
    for fixture in (known[name] for name in names or known):
        try:
            paths, lines = regenerate(fixture, ROOT)
        except Skipped as reason:
            print(f"{fixture.name}: skipped, {reason}")
            complete = False
            continue
        except Exception as error:  # whatever a builder raises, the others are still made
            text = " ".join(str(error).split())
            lines, paths = [f"{fixture.name} cannot be made: {type(error).__name__}: {text}"], []
        made |= set(paths)
        wrong += lines
        print(f"{fixture.name}: {len(paths)} files made, {len(paths) - len(lines) if paths else 0} the same")
    if complete:
        stored = {ORACLES / path for path in _files(ROOT / ORACLES)}
        wrong += [f"{path} is stored, but no fixture makes it" for path in sorted(stored - made)]
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
