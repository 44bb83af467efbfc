"""Results for other programs and for pull requests: Markdown, JSON, CSV and JUnit XML."""

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from parity.comparison.check import Result, TapResult, unusable_json
from parity.comparison.compare import Comparison, TapComparison
from parity.comparison.verdict import AGREE, DIVERGE
from parity.localize.findings import Localization
from parity.report.output import Format
from parity.report.run_page import SYMBOLS, UNSUPPORTED, Row, counted, error_of, first_line, significant
from parity.report.words import localization_markdown

SHOWN = 20
"""Taps that a Markdown table lists at most."""


Item = Row | Result | Comparison | Localization
"""What can be written: a row of a run, a check, a comparison, a localization."""

PASSED, FAILED, ERROR, SKIPPED = "passed", "failure", "error", "skipped"


@dataclass(frozen=True)
class Case:
    """One test case of JUnit: a tap or a finding, how it ended, and why."""

    name: str
    status: str
    message: str = ""


def render(items: Item | Sequence[Item], form: Format) -> str:
    """Return one result, or several as one document, in a format; it ends with a line break.

    JSON holds one object, of several results `{"results": [...]}`. CSV has a line for each tap, and one that says why
    for a result without any. JUnit has a suite for each result and a case for each tap or finding; what neither agrees
    nor has a case that failed gets one.
    """
    several = isinstance(items, Sequence)
    listed = list(items) if several else [items]
    if form is Format.JSON:
        documents = [_json(item) for item in listed]
        document = {"results": documents} if several else documents[0]
        return json.dumps(document, indent=1, allow_nan=False) + "\n"
    if form is Format.CSV:
        return _csv(listed)
    if form is Format.JUNIT:
        return _junit(listed)
    if not several:
        return _section(listed[0])
    parts = [_summary(listed), *(_section(item) for item in listed if item.verdict not in (AGREE, UNSUPPORTED))]
    return "\n".join(parts)


def _names(item: Item) -> tuple[str, str]:
    return (item.a, item.b) if isinstance(item, Comparison) else (item.bundle, item.impl)


def _reason(item: Item) -> str:
    """Why an item does not agree, or what was compared."""
    if isinstance(item, Row):
        return item.message
    return first_line(item) if isinstance(item, Result) else item.reason


def _json(item: Item) -> dict[str, Any]:
    if isinstance(item, Row):
        if item.result is not None:
            return item.result.to_json()
        return unusable_json(item.bundle, item.impl, item.message) | {"verdict": item.verdict}
    return item.to_json()


def _csv(items: Sequence[Item]) -> str:
    import pandas

    keys = ("a", "b") if items and isinstance(items[0], Comparison) else ("bundle", "impl")
    lines = []
    for item in items:
        head = dict(zip(keys, _names(item), strict=True)) | {"verdict": item.verdict}
        document = _json(item)
        taps = [*document.get("inputs", ()), *document.get("taps", ())]
        taps += [{"tap": name, "mismatch": "missing"} for name in document.get("missing", document.get("only_a", ()))]
        lines += [head | {key: _cell(key, value) for key, value in tap.items()} for tap in taps]
        lines += [] if taps else [head | {"reason": _reason(item)}]
    frame = pandas.DataFrame(lines)
    columns = [*frame.columns.drop("reason", errors="ignore"), "reason"]
    return frame.reindex(columns=columns).to_csv(index=False, lineterminator="\n")


def _cell(key: str, value: Any) -> Any:
    """A shape as 2x3, an index as 0 1."""
    return ("x" if "shape" in key else " ").join(map(str, value)) if isinstance(value, list) else value


def _junit(items: Sequence[Item]) -> str:
    root = ET.Element("testsuites", name="lance-parity")
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for item in items:
        first, second = _names(item)
        cases = _cases(item)
        counts = {
            "tests": len(cases),
            "failures": sum(case.status == FAILED for case in cases),
            "errors": sum(case.status == ERROR for case in cases),
            "skipped": sum(case.status == SKIPPED for case in cases),
        }
        totals = {key: totals[key] + counts[key] for key in totals}
        suite = ET.SubElement(root, "testsuite", name=_xml(f"{first} {second}"), **_texts(counts))
        result = item.result if isinstance(item, Row) else item
        if getattr(result, "seconds", None) is not None:
            suite.set("time", f"{result.seconds:.3f}")
        for case in cases:
            element = ET.SubElement(suite, "testcase", classname=_xml(f"{first}.{second}"), name=_xml(case.name))
            if case.status != PASSED:
                lines = case.message.splitlines() or [""]
                told = ET.SubElement(element, case.status, message=_xml(lines[0]))
                told.text = _xml(case.message) if len(lines) > 1 else None
    for key, value in _texts(totals).items():
        root.set(key, value)
    ET.indent(root, " ")
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _cases(item: Item) -> list[Case]:
    cases = list(_of_parts(item))
    if all(case.status in (PASSED, SKIPPED) for case in cases) and item.verdict != AGREE:
        status = {DIVERGE: FAILED, UNSUPPORTED: SKIPPED}.get(item.verdict, ERROR)
        cases.append(Case("verdict", status, f"{item.verdict}: {_reason(item)}"))
    return cases


def _of_parts(item: Item) -> Iterator[Case]:
    if isinstance(item, Row):
        if item.result is not None:
            yield from _of_parts(item.result)
    elif isinstance(item, Localization):
        yield from _of_localization(item)
    else:
        taps = [*item.inputs, *item.taps] if isinstance(item, Result) else item.taps
        for tap in taps:
            name = tap.tap.name if isinstance(tap, TapResult) else tap.name
            yield Case(name, FAILED if tap.diverges else PASSED, _told(tap) if tap.diverges else "")
        if isinstance(item, Result):
            yield from (Case(name, ERROR, "missing: the implementation did not compute it") for name in item.missing)
        else:
            status = SKIPPED if item.verdict == AGREE else ERROR
            yield from (Case(name, status, f"missing from {item.b}") for name in item.only_a)


def _of_localization(found: Localization) -> Iterator[Case]:
    """Findings fail; taps that are wrong by themselves and belong to no finding fail too, the others pass."""
    covered = {name for finding in found.findings for name in (finding.tap, *finding.also)}
    for finding in found.findings:
        lines = [finding.detail or f"{finding.component} is wrong"]
        if finding.local_error is not None:
            lines.append(f"local error {significant(finding.local_error)}, floor {significant(finding.floor)}")
        lines += [f"{e.name}: removes {e.residual_removed:.1%}" for e in finding.explanations[:3]]
        yield Case(finding.tap, FAILED, "\n".join(lines))
    for tap in found.taps:
        if tap.tap.name in covered:
            continue
        local = tap.mismatch or f"local error {significant(tap.local)}, allowed {significant(tap.allowed)}"
        yield Case(tap.tap.name, FAILED if tap.wrong else PASSED, local if tap.wrong else "")
    yield from (Case(name, PASSED) for name in found.exact if name not in covered)


def _told(tap: TapResult | TapComparison) -> str:
    d = tap.difference
    limit = tap.limit.allowed if isinstance(tap, TapResult) else tap.limit
    if d.mismatch:
        return d.mismatch
    text = f"error {significant(d.rel_l2)}, limit {significant(limit)}"
    if d.at is None:
        return text
    return f"{text}\nlargest difference at {list(d.at)}: {d.got:.9g} instead of {d.expected:.9g}"


def _texts(counts: dict[str, int]) -> dict[str, str]:
    return {key: str(value) for key, value in counts.items()}


def _xml(text: str) -> str:
    """Text without the characters that XML cannot hold."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\N{REPLACEMENT CHARACTER}", text)


def _summary(items: Sequence[Item]) -> str:
    lines = []
    for item in items:
        result = item.result if isinstance(item, Row) else item
        worst = result.worst if isinstance(result, Result) else None
        lines.append(
            (
                *map(_code, _names(item)),
                getattr(item, "dtype", ""),
                str(result.compared if isinstance(result, Result) else len(getattr(result, "taps", ()))),
                _code(worst.tap.name) if worst else "",
                error_of(worst.difference) if worst else "",
                _signed(item.verdict) + (f": {_plain(item.message)}" if item.verdict == UNSUPPORTED else ""),
            )
        )
    return _table(("bundle", "implementation", "dtype", "taps", "worst tap", "error", "verdict"), lines)


def _section(item: Item) -> str:
    if isinstance(item, Localization):
        return localization_markdown(item)
    if isinstance(item, Row) and item.result is not None:
        return _section(item.result)
    first, second = _names(item)
    lines = [f"### {_code(first)}, {_code(second)}: {_signed(item.verdict)}", ""]
    if item.verdict != AGREE:
        lines += [_plain(_reason(item)), ""]
    if isinstance(item, Row):
        return "\n".join(lines)
    taps = [*item.inputs, *item.taps] if isinstance(item, Result) else list(item.taps)
    diverging = [tap for tap in taps if tap.diverges]
    # Where nothing diverges the farthest say how far that is from it.
    chosen = diverging or sorted((tap for tap in taps if tap.difference.rel_l2), key=_error, reverse=True)
    table = [_tap_line(tap) for tap in chosen[:SHOWN]]
    if table:
        kind = "Diverging" if diverging else "Farthest"
        some = f", {SHOWN} of {len(chosen)}" if len(chosen) > SHOWN else ""
        lines += [f"{counted(len(taps), 'tap')} compared. {kind}{some}:", ""]
        lines.append(_table(("tap", "shape", "dtype", "error", "limit", "largest difference", "equal bits"), table))
    elif taps:
        lines += [f"{counted(len(taps), 'tap')} compared, every bit equal.", ""]
    missing = item.missing if isinstance(item, Result) else item.only_a
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        lines += [f"missing: {', '.join(map(_code, missing[:SHOWN]))}{more}", ""]
    return "\n".join(lines)


def _error(tap: TapResult | TapComparison) -> float:
    return tap.difference.rel_l2


def _tap_line(tap: TapResult | TapComparison) -> tuple[str, ...]:
    d = tap.difference
    limit = tap.limit.allowed if isinstance(tap, TapResult) else tap.limit
    name = tap.tap.name if isinstance(tap, TapResult) else tap.name
    largest = _plain(d.mismatch) if d.mismatch else significant(d.max_abs)
    equal = "–" if d.bits_equal is None else f"{d.bits_equal:.1%}"
    shape = "×".join(map(str, tap.shape))
    return _code(name), shape, tap.dtype, error_of(d), significant(limit), largest, equal


def _signed(verdict: str) -> str:
    return f"{SYMBOLS.get(verdict, '?')} {verdict}"


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """A name as code, on one line."""
    quoted = " ".join(text.split()).replace("`", "'").replace("|", r"\|")
    return f"`{quoted}`"
