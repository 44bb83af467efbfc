"""Have `localize` look at blind faults and write what it tells, and make a table of it once a reader has graded that.

    python scripts/blind_table.py ROWS.jsonl [--bundles FOLDER...] [--only PATTERN]... [--every N]
    python scripts/blind_table.py ROWS.jsonl --ungraded FILE.json
    python scripts/blind_table.py ROWS.jsonl --grades FILE.json... [--output FILE.md] [--confidence FILE.json]

The first form tries every blind fault on two bundles, of another task or dtype where there are such, and appends one
JSON object a trial to ROWS.jsonl; trials that are in the file already are left out, so that it may be interrupted. The
second writes a list of {fault, bundle, about, told, grade} of what was told and is not graded yet, for a reader to fill
in grade with "right" (the text says what the fault does), "wrong" (it says something else) or "none" (it names no
cause). The third makes the table by kind in Markdown. A grade holds for the very text that was told; where nothing was
told none is needed. With --confidence it also counts how many of the explanations were right, said beforehand or read
from the data, by kind of component, of the trials in which one alone was told: what parity/lance/confidence.json holds.
Exit status: 0 done, 1 something told has no grade, 2 a file or bundle cannot be used.
"""

import argparse
import json
import sys
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from blind_faults import BLIND, KINDS, BlindFault
from tables import table

from parity import memory
from parity.bundle.reading import Bundle, find_bundles, read_bundle
from parity.comparison.verdict import DIVERGE
from parity.errors import ParityError
from parity.localize.confidence import counted
from parity.localize.findings import Localization
from parity.localize.investigation import localize
from parity.report.runner import limit_threads
from parity.tensors.metrics import finite
from parity.tensors.names import starred

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "oracles"
BUNDLES = 2
REFUSED = "refused"
"""Verdict of a run that ended in an error."""
GRADES = ("right", "wrong", "none")
Row = dict[str, Any]
Key = tuple[str, str]


@dataclass(frozen=True)
class Grades:
    """What a reader thinks of what was told, by fault, bundle and text."""

    values: dict[tuple[str, str, str], str]

    @classmethod
    def read(cls, paths: Iterable[Path]) -> "Grades":
        """Of JSON files with a list of {fault, bundle, told, grade}, empty grades left out; raises ParityError."""
        values = {}
        for path in paths:
            for entry in _json(path):
                if grade := entry.get("grade"):
                    if grade not in GRADES:
                        raise ParityError(f"{path}: {entry['fault']} has the grade {grade!r}: say {', '.join(GRADES)}")
                    values[entry["fault"], entry["bundle"], entry["told"]] = grade
        return cls(values)

    def of(self, row: Row) -> str | None:
        """The grade of a row: "none" where nothing was told, None where nobody has graded it."""
        return self.values.get((row["fault"], row["bundle"], row["told"])) if row["told"] else "none"


def main() -> int:
    """Run the command line and return its exit status."""
    args = _arguments()
    try:
        if args.grades is None and args.ungraded is None:
            return try_all(args.rows, args.bundles, args.only, args.every)
        rows = read_rows(args.rows)
        grades = Grades.read(args.grades or [])
        left = [row for row in rows if grades.of(row) is None]
        if args.ungraded:
            args.ungraded.write_text(json.dumps([_to_grade(row) for row in left], indent=1) + "\n", encoding="utf-8")
            print(f"{len(left)} of {len(rows)} rows are to be graded", file=sys.stderr)
            return 0
        text = summary(rows, grades)
        if args.output:
            args.output.write_text(text, encoding="utf-8")
        if args.confidence:
            args.confidence.write_text(json.dumps(confidence(rows, grades), indent=1) + "\n", encoding="utf-8")
        print(text, end="")
        return 1 if left else 0
    except ParityError as error:
        print(f"blind_table: {error}", file=sys.stderr)
        return 2


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, metavar="ROWS.jsonl", help="what was told, a line a trial")
    parser.add_argument(
        "--bundles", type=Path, nargs="+", metavar="FOLDER", help="folders of bundles (default: shared, or oracles/)"
    )
    parser.add_argument("--only", action="append", metavar="PATTERN", help="try only faults with such names")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="try only every Nth fault of those")
    parser.add_argument("--ungraded", type=Path, metavar="FILE", help="write what a reader has still to grade")
    parser.add_argument("--grades", type=Path, nargs="+", metavar="FILE", help="make the table with these grades")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there as well")
    parser.add_argument("--confidence", type=Path, metavar="FILE", help="write how many explanations were right")
    return parser.parse_args()


def try_all(output: Path, folders: Sequence[Path] | None, only: Sequence[str] | None, every: int = 1) -> int:
    """Append a row for every trial that is not in the file."""
    limit_threads()
    paths = find_bundles(folders or [SHARED if SHARED.is_dir() else ROOT / "oracles"])
    bundles = sorted(map(read_bundle, paths), key=lambda bundle: bundle.name)
    faults = [fault for fault in BLIND if any(fnmatchcase(fault.name, pattern) for pattern in only or ["*"])]
    if not faults:
        raise ParityError(f"no blind fault is called {' or '.join(only)}")
    done = {(row["fault"], row["bundle"]) for row in read_rows(output)} if output.exists() else set()
    trials = []
    for fault in faults[::every]:
        chosen = choose(fault, bundles)
        if not chosen:
            print(f"{fault.name} is not tried: no bundle shows it", file=sys.stderr)
        trials += [(fault, bundle) for bundle in chosen if (fault.name, bundle.name) not in done]
    began, peak = time.perf_counter(), 0
    with output.open("a", encoding="utf-8") as file:
        for number, (fault, bundle) in enumerate(trials, 1):
            row = attempt(fault, bundle)
            peak = max(peak, memory.peak() or 0)
            file.write(json.dumps(row) + "\n")
            file.flush()
            told = f"{number}/{len(trials)} {fault.name} on {bundle.name}: {row['verdict']}, {row['seconds']:.0f} s"
            print(told, file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began
    print(f"{len(trials)} trials in {seconds:.0f} s, at most {peak / 2**20:.0f} MiB", file=sys.stderr)
    return 0


def choose(fault: BlindFault, bundles: Sequence[Bundle]) -> list[Bundle]:
    """The bundles that a fault is tried on: always the same ones of the same bundles, whatever else is tried.

    The second differs from the first in task and dtype, else in task, else in dtype, where there is such a one.
    """
    fit = [bundle for bundle in bundles if fault.suits(bundle)]
    start = zlib.crc32(fault.name.encode()) % max(len(fit), 1)
    rest = fit[start:] + fit[:start]
    picked: list[Bundle] = []
    while rest and len(picked) < BUNDLES:
        rest.sort(key=lambda bundle: max((_alike(bundle, other) for other in picked), default=0))
        picked.append(rest.pop(0))
    return picked


def _alike(one: Bundle, other: Bundle) -> int:
    return 2 * (one.task == other.task) + (one.dtype == other.dtype)


def attempt(fault: BlindFault, bundle: Bundle) -> Row:
    """What is told of a fault on a bundle."""
    began = time.perf_counter()
    row = {"fault": fault.name, "about": fault.about, "kind": fault.kind, "bundle": bundle.name}
    try:
        row |= told_of(fault, localize(bundle.path, faults=[fault]))
    except ParityError as error:
        row |= {"verdict": REFUSED, "reason": str(error), "named": False, "findings": [], "told": ""}
    memory.give_back()
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def told_of(fault: BlindFault, found: Localization) -> Row:
    """The part of a row that a localization makes; `told` is what it says with confidence, of all findings."""
    findings = []
    for finding in found.findings:
        first = finding.explanations[0] if finding.explanations else None
        findings.append(
            {
                "component": finding.component,
                "explanation": first and finding.cause_names,
                "removed": first and finite(first.residual_removed),
                "second": first and finite(first.second),
                "certain": finding.certain,
                "read": first and first.read,
                "support": finding.support,
            }
        )
    told = "; ".join(_said(each) for each in findings if each["certain"])
    named = found.first is not None and fnmatchcase(found.first.component, fault.component)
    return {"verdict": found.verdict, "reason": found.reason, "named": named, "findings": findings, "told": told}


def _said(finding: Row) -> str:
    where = f", {finding['support']}" if finding["support"] else ""
    return f"{finding['component']}{where}: {finding['explanation']}"


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; a last line that was cut off is taken out of it. Raises ParityError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ParityError(f"{path} cannot be read ({error.strerror}): try faults first") from None
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise ParityError(f"{path} holds a line that is no JSON ({error})") from None


def _json(path: Path) -> list[Row]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ParityError(f"{path} cannot be read ({error}): give the filled-in list of --ungraded") from None
    keys = {"fault", "bundle", "told", "grade"}
    if not isinstance(entries, list) or any(not isinstance(e, dict) or keys - e.keys() for e in entries):
        raise ParityError(f"{path} must hold a list of objects with {', '.join(sorted(keys))}")
    return entries


def _to_grade(row: Row) -> Row:
    return {key: row[key] for key in ("fault", "bundle", "about", "told")} | {"grade": ""}


def confidence(rows: Sequence[Row], grades: Grades) -> dict[str, dict[str, list[int]]]:
    """How many explanations were right, by sort and kind of component, of trials in which one alone was told."""
    graded = []
    for row in rows:
        told = [finding for finding in row["findings"] if finding["certain"]]
        if len(told) == 1 and (grade := grades.of(row)) in ("right", "wrong"):
            graded.append((told[0]["read"], starred(told[0]["component"]), grade == "right"))
    return counted(graded)


def summary(rows: Sequence[Row], grades: Grades) -> str:
    """The table by kind, and the trials that were not detected or were told wrong below it, in Markdown."""
    groups = [(kind, [row for row in rows if row["kind"] == kind]) for kind in KINDS]
    lines = [_counts(name, group, grades) for name, group in (*groups, ("all", list(rows))) if group]
    heads = ("kind", "faults", "trials", "detected", "first component right", "cause right", "none told")
    text = table((*heads, "wrong with confidence", "not graded"), lines)
    missed = [row for row in rows if row["verdict"] != DIVERGE]
    wrong = [row for row in rows if grades.of(row) == "wrong"]
    text += "".join(f"\nNot detected: {row['fault']} on {row['bundle']}, {row['verdict']}.\n" for row in missed)
    return text + "".join(f"\nTold wrong: {row['fault']} on {row['bundle']}: {row['told']}\n" for row in wrong)


def _counts(name: str, rows: Sequence[Row], grades: Grades) -> tuple[object, ...]:
    given = [grades.of(row) for row in rows]

    def share(events: Iterable[bool]) -> str:
        count = sum(events)
        return f"{count} ({count / len(rows):.0%})"

    return (
        name,
        len({row["fault"] for row in rows}),
        len(rows),
        share(row["verdict"] == DIVERGE for row in rows),
        share(row["named"] for row in rows),
        share(grade == "right" for grade in given),
        share(grade == "none" for grade in given),
        share(grade == "wrong" for grade in given),
        share(grade is None for grade in given),
    )


if __name__ == "__main__":
    sys.exit(main())
