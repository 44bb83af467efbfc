"""Verifies what is kept: checksums, formats, values, and everything that can be derived anew."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from parity.bundle.checks import CONFIG, WEIGHTS
from parity.bundle.reading import CHECKSUMS, Bundle, read_bundle
from parity.bundle.store import checksums, compare_files, listed, read_manifest, whole_bundles
from parity.errors import ParityError, printable
from parity.model import definition
from parity.tensors.recording import Recording, Tap, read_tensors
from parity.tensors.sketch import Sketch
from parity.tensors.sketch_file import FILE as SKETCHES
from parity.tensors.sketch_file import read_sketches

SOUND, FAILS, UNUSABLE = "sound", "fails", "unusable"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the file or tensor, what about it, and whether that kept more from being looked at."""

    place: str
    what: str
    unusable: bool = False


@dataclass
class Verified:
    """What was found in one bundle, or in the rest of a folder; the counts are of what was looked at.

    Attributes:
        name: the bundle's, or CHECKSUMS for the files of a folder that belong to no bundle.
        files: files that have a checksum.
        tensors: tensors whose shape, dtype and values were checked.
        derived: tensors that were derived anew.
        unjudged: why the reference was not held against the taps, where its weights are not there; empty otherwise.
    """

    name: str
    files: int = 0
    tensors: int = 0
    derived: int = 0
    problems: list[Problem] = field(default_factory=list)
    unjudged: str = ""

    @property
    def verdict(self) -> str:
        """FAILS for anything wrong that could be looked at, UNUSABLE where nothing more could be."""
        if not self.problems:
            return SOUND
        return UNUSABLE if all(problem.unusable for problem in self.problems) else FAILS

    def add(self, place: str, what: str, unusable: bool = False) -> None:
        """Note a problem."""
        self.problems.append(Problem(printable(place), printable(what), unusable))


def verify(
    folder: Path, start: Callable[[str], Callable[[str], None]] = lambda name: lambda what: None
) -> list[Verified]:
    """Verify one bundle, or every bundle in a folder and the other files that its MANIFEST.json lists.

    `start` is told the name of each before it is looked at, and returns what is told what is done then. Raises
    ParityError where there is nothing to verify.
    """
    paths = whole_bundles([folder])
    results = []
    single = paths == [folder]
    root = folder.resolve().parent if single else folder.resolve()
    others = _others(root, paths, single)
    if others:
        start(CHECKSUMS)
        results.append(_verify_files(root, others))
    for path in paths:
        results.append(verify_bundle(path, start(path.name)))
    return results


def exit_status(results: Sequence[Verified]) -> int:
    """Return 1 if anything fails, else 2 if anything is unusable or nothing was verified, else 0."""
    verdicts = {result.verdict for result in results}
    return 1 if FAILS in verdicts else 2 if UNUSABLE in verdicts or not verdicts else 0


def verify_bundle(path: Path, tell: Callable[[str], None] = lambda what: None) -> Verified:
    """Verify one bundle: its checksums, every tensor in it, and what can be derived."""
    found = Verified(path.name)
    try:
        manifest = read_manifest(path)
        sums = checksums(path, manifest)
        definition().check_request(manifest["request"], "manifest.json")
    except ParityError as error:
        found.add("manifest.json", str(error), unusable=True)
        return found
    found.files = sums.checked
    for name in sums.wrong:
        found.add(name.removeprefix(f"{path.name}/"), "does not match its checksum")
    inputs, taps = (_read(path / f"{kind}.safetensors", found) for kind in ("inputs", "taps"))
    if inputs is None or taps is None:
        return found
    try:
        sketches = read_sketches(path, manifest)
    except ParityError as error:
        found.add(SKETCHES, str(error), unusable=True)
        return found
    _check_listing(manifest, taps | sketches, found)
    found.tensors += len(sketches)
    for name, sketch in sketches.items():
        if count := int(sketch.statistics[:, -1].sum()):
            found.add(name, f"{count} element{' is' if count == 1 else 's are'} not finite")
    for place, tensors in (("inputs/", inputs), ("", taps)):
        found.tensors += len(tensors)
        for name, tap in tensors.items():
            bad = np.argwhere(~np.isfinite(tap.array))
            if len(bad):
                at = [int(i) for i in bad[0]]
                count = f" ({len(bad)} elements)" if len(bad) > 1 else ""
                found.add(f"{place}{name}", f"holds {tap.array[tuple(at)]} at {at}{count}")
    bundle = _bundle(path, manifest, inputs, taps, found)
    bundle = bundle and replace(bundle, sketches=sketches)
    if bundle is not None:
        _check_checkpoint(bundle, found)
        damaged = bool(found.problems)
        for item in definition().derive(bundle):
            found.derived += 1
            if item.problem is not None:
                found.add(item.tensor, f"{item.problem} ({item.quantity})")
        # What is known to be damaged is no news; but what does not follow from other taps may be right, and they wrong.
        if not damaged and all(problem.place in bundle.expected for problem in found.problems):
            _judge(bundle, found, tell)
    return found


def _judge(bundle: Bundle, found: Verified, tell: Callable[[str], None]) -> None:
    """Hold the reference against every tap, where the weights are at hand; where they disagree stands first."""
    from parity.oracle.floors_file import judge_bundle

    try:
        judgement = judge_bundle(bundle.path, tell)
    except ParityError as error:
        if definition().has_weights(bundle):
            found.add("reference", str(error).removeprefix("reference "), unusable=True)
        else:
            found.unjudged = str(error)
        return
    if not judgement.agree:
        found.add(judgement.departures[0].tap.name, judgement.sentence())
        found.problems.insert(0, found.problems.pop())


def _check_checkpoint(bundle: Bundle, found: Verified) -> None:
    """Compare the checkpoint, as far as it is at hand, with the manifest's checksums."""
    for key in (CONFIG, WEIGHTS):
        if key == CONFIG or definition().has_weights(bundle):
            try:
                if changed := definition().changed(bundle, key):
                    found.add(*changed)
            except ParityError as error:
                found.add("manifest.json", str(error), unusable=True)


def _others(root: Path, paths: Sequence[Path], single: bool) -> dict[str, Any]:
    """The entries of MANIFEST.json that belong to no bundle; beside a single bundle those of its checkpoint."""
    entries = {name: e for name, e in listed(root).items() if not name.startswith(tuple(f"{p.name}/" for p in paths))}
    if not single:
        return entries
    try:
        checkpoint = read_manifest(paths[0]).get("checkpoint")
    except ParityError:
        return {}
    return {name: entry for name, entry in entries.items() if name.startswith(f"{checkpoint}/")}


def _verify_files(root: Path, entries: dict[str, Any]) -> Verified:
    sums = compare_files(root, entries)
    found = Verified(CHECKSUMS, files=sums.checked)
    for name in sums.wrong:
        found.add(name, "does not match its checksum" if os.path.isfile(root / name) else "is missing")
    return found


def _read(path: Path, found: Verified) -> Recording | None:
    if not path.is_file():
        found.add(path.name, "is missing: copy the bundle again", unusable=True)
        return None
    try:
        return read_tensors(path)
    except ParityError as error:
        found.add(path.name, str(error), unusable=True)
        return None


def _check_listing(manifest: dict[str, Any], taps: Mapping[str, Tap | Sketch], found: Verified) -> None:
    """Compare the manifest's list of taps with the tensors."""
    names = set()
    for entry in manifest["taps"]:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            found.add("manifest.json", f"lists a tap without a name: {entry!r}"[:200])
            continue
        tap = taps.get(name)
        if name in names:
            found.add(name, "is listed twice in manifest.json")
        elif tap is None:
            found.add(name, "is listed in manifest.json but missing from taps.safetensors")
        elif list(tap.shape) != entry.get("shape"):
            found.add(name, f"has shape {list(tap.shape)}, manifest.json says {entry.get('shape')}")
        elif tap.dtype != entry.get("dtype"):
            found.add(name, f"has dtype {tap.dtype}, manifest.json says {entry.get('dtype')}")
        names.add(name)
    for name in sorted(set(taps) - names):
        found.add(name, "is not listed in manifest.json")


def _bundle(path: Path, manifest: dict, inputs: Recording, taps: Recording, found: Verified) -> Bundle | None:
    """The bundle to derive from; where no other problem explains why it cannot be read, that is one."""
    if not found.problems:
        try:
            return read_bundle(path)
        except ParityError as error:
            found.add("manifest.json", str(error), unusable=True)
            return None
    # What is damaged in one place may still be derived in the others.
    path = path.resolve()
    checkpoint = path.parent / str(manifest.get("checkpoint"))
    # pathlib raises for names that no disk takes.
    usable = os.path.isfile(checkpoint / str(manifest.get("variant")) / "llm_config.json")
    return Bundle(path, manifest, inputs, taps, checkpoint) if usable else None
