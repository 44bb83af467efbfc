"""The HTML report of a localization: one page that needs nothing else, and its plots beside it."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parity.localize.attribution import Attribution, Worth
from parity.localize.findings import EXPLAINS, Finding, Localization, Picture, SliceError
from parity.report import words
from parity.report.drawing import STEPS, THEMES, Plot
from parity.report.law_plots import law_plot
from parity.report.map import Map, lay_out, shade
from parity.report.output import new_folder
from parity.report.pictures import Frames, frames_of, is_frames, picture_plot
from parity.report.plots import exact_shades, map_plot, margins_plot, order_plot, trajectory_plot
from parity.report.run_page import page_environment
from parity.report.words import localization_markdown
from parity.tensors.names import parse

__all__ = ["localization_markdown", "write_localization"]

# Beyond these the page would grow past reading; what is left out is said there.
PICTURES, BARS, STATIC_ROWS = 12, 10, 100
LEGEND = {
    "r0": "≤ 0.3",
    "r1": "≤ 1",
    "r2": "allowed",
    "w1": "≤ 10",
    "w2": "≤ 100",
    "w3": "≤ 1e3",
    "w4": "≤ 1e4",
    "w5": "> 1e4",
    "wi": "∞, NaN, shape",
    "none": "no floor",
}


@dataclass
class Drawn:
    """All that is drawn for a page: plots by name, those of each finding by its number, what could not be drawn."""

    plots: dict[str, Plot] = field(default_factory=dict)
    of_finding: dict[int, list[Plot]] = field(default_factory=dict)
    others: list[Plot] = field(default_factory=list)
    frames: list[Frames] = field(default_factory=list)
    causes: list[Frames | None] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def files(self) -> dict[str, bytes]:
        """Return the PNG files that lie beside the page."""
        plots = [*self.plots.values(), *(p for many in self.of_finding.values() for p in many), *self.others]
        files = {f"{plot.name}.png": plot.light for plot in plots}
        for clip, frames in enumerate(self.frames, 1):
            files |= {f"clip-{clip}-frame-{frame.number:03d}.png": frame.png for frame in frames.frames}
        for number, frames in enumerate(self.causes, 1):
            if frames is not None:
                files[f"cause-{number}.png"] = frames.worst.png
        return files


def write_localization(folder: Path, localization: Localization) -> Path:
    """Write the page and its plots as PNG into a folder, anew, and return the page's path; see new_folder."""
    drawn = draw(localization)
    files = drawn.files() | {"index.html": render(localization, drawn).encode(errors="replace")}
    with new_folder(folder) as new:
        for name, data in files.items():
            (new / name).write_bytes(data)
    return folder / "index.html"


def draw(localization: Localization) -> Drawn:
    """Return all plots of a localization."""
    drawn = Drawn()
    for make in (map_plot, order_plot, trajectory_plot, margins_plot):
        if plot := make(localization):
            drawn.plots[plot.name] = plot
    numbers = {finding.tap: number for number, finding in reversed(list(enumerate(localization.findings, 1)))}
    for place, picture in enumerate(localization.pictures, 1):
        if place > PICTURES:
            drawn.left_out.append(f"{picture.tap.name} (only the first {PICTURES} are drawn)")
        elif is_frames(picture):
            drawn.frames.append(frames_of(picture))
        else:
            _draw_picture(drawn, picture, f"tap-{place}", numbers.get(picture.tap.name))
    for number, finding in enumerate(localization.findings, 1):
        best = finding.explanations[0] if finding.explained else None
        if best and best.figure:
            drawn.of_finding.setdefault(number, []).append(law_plot(best.figure, f"law-{number}", best.name))
    attribution = localization.attribution
    for worth in attribution.worths if attribution else ():
        drawn.causes.append(_result_of(attribution, worth))
    return drawn


def _result_of(attribution: Attribution, worth: Worth) -> Frames | None:
    """What a run ends in where one cause alone is wrong, beside the oracle's; None where that is no picture."""
    if attribution.expected is None or worth.result is None:
        return None
    picture = Picture(parse(attribution.result), attribution.expected.array, worth.result.array)
    return frames_of(picture) if is_frames(picture) else None


def _draw_picture(drawn: Drawn, picture: Picture, name: str, finding: int | None) -> None:
    plot = picture_plot(picture, name)
    if plot is None:
        shapes = f"{list(picture.got.shape)} where the oracle has {list(picture.expected.shape)}"
        drawn.left_out.append(f"{picture.tap.name} (its shape is {shapes})")
    elif finding:
        drawn.of_finding.setdefault(finding, []).append(plot)
    else:
        drawn.others.append(plot)


def render(localization: Localization, drawn: Drawn) -> str:
    """Return the page."""
    environment = page_environment()
    environment.filters |= {
        "bars": lambda explanations: explanations[:BARS],
        "parts": parts_of,
        "multiple": words.multiple,
        "number": words.number,
        "percent": words.percent,
        "removed": lambda share: "makes it worse" if share < -0.0005 else words.tenths(share),
        "tenths": words.tenths,
        "times": words.times,
        "width": lambda share: f"{100 * min(max(share, 0), 1):.2f}%",
    }
    laid = lay_out(localization)
    wrong = [tap for tap in localization.taps if tap.wrong]
    return environment.get_template("localization.html").render(
        it=localization,
        drawn=drawn,
        verdict=words.VERDICTS[localization.verdict],
        said=words.said(localization),
        explained=words.explained,
        failures=words.failures,
        slices=slices_by_axis,
        counted=words.counted(localization),
        false_alarms=words.false_alarms(localization),
        departs=words.departs(localization),
        request=_plain(localization.request),
        wrong=wrong[:STATIC_ROWS],
        wrong_count=len(wrong),
        laid=laid,
        legend=LEGEND,
        themes=THEMES,
        explains=EXPLAINS,
        data=embedded(page_data(localization, laid)),
    )


def parts_of(name: str) -> list[str]:
    """Return the parts of a name, after each of which it may be broken."""
    return re.split(r"(?<=[./_])(?!$)", name)


def slices_by_axis(finding: Finding) -> list[tuple[str, list[SliceError], int]]:
    """Return the axes of a finding's slices, each with its largest ones and how many are left out.

    Frames, channels and tokens keep their order where all of them are shown.
    """
    axes: dict[str, list[SliceError]] = {}
    for part in finding.slices:
        axes.setdefault(part.axis, []).append(part)
    shown = []
    for axis, parts in axes.items():
        largest = parts if len(parts) <= BARS else sorted(parts, key=_badness, reverse=True)[:BARS]
        shown.append((axis, largest, len(parts) - len(largest)))
    return shown


def page_data(localization: Localization, laid: Map) -> dict[str, Any]:
    """Return what the page's script draws the map and the table from: strings once, taps as short lists."""
    strings: dict[str, int] = {}

    def known(text: str) -> int:
        return strings.setdefault(text, len(strings))

    taps = []
    for tap in localization.taps:
        head, slash, tail = tap.tap.name.partition("/")
        shape = " × ".join(map(str, tap.shape))
        row: list[Any] = [known(head + slash), known(tail), known(tap.tap.component), known(tap.tap.call)]
        values = (tap.local, tap.ratio, tap.allowed, tap.propagated, tap.total, tap.gain)
        row += [_compact(value) for value in values]
        row += [int(tap.wrong), known(tap.source), known(shape), known(tap.dtype), known(tap.mismatch or "")]
        row.append(known(shade(tap.ratio, tap.wrong)))
        taps.append(row)
    return {
        "taps": taps,
        "strings": list(strings),
        "order": ["none", *STEPS],
        "panels": [{"name": p.name, "rows": p.rows, "columns": p.columns} for p in laid.panels],
        "around": laid.around,
        "places": laid.places,
        "exact": exact_shades(localization, laid),
        "findings": [[finding.component, finding.tap, finding.call] for finding in localization.findings],
    }


def embedded(data: dict[str, Any]) -> str:
    """Return JSON that can stand inside a script element."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    return text.translate(str.maketrans(escapes))


def _compact(value: float | None) -> float | str | None:
    """Return a number with three digits; JSON has none that are not finite."""
    if value is None or math.isfinite(value):
        return value and float(f"{value:.3g}")
    return "nan" if math.isnan(value) else "inf"


def _badness(part: SliceError) -> float:
    return math.inf if math.isnan(part.share) else part.share


def _plain(request: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a request's entries as text, those of one word as they are."""
    entries: Iterable[tuple[str, Any]] = request.items()
    return [(key, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for key, v in entries]
