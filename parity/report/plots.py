"""The plots of a localization: the map, errors over the order of execution, the trajectory, an answer's margins; and
the errors of a comparison."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from parity.comparison.check import Result
from parity.localize.findings import LOCAL, Localization, TapError
from parity.oracle.oracle import UPSTREAM
from parity.report.drawing import LEGEND, POWERS, STEPS, Plot, Theme, plot
from parity.report.map import Map, lay_out, shade

# Errors below this one, exact agreement included, are drawn on the lowest line.
LOWEST, HIGHEST = 1e-10, 1e4


def order_plot(localization: Localization) -> Plot | None:
    """Return local, propagated and total errors and the allowed ones over the order of execution."""
    taps = [t for t in localization.taps if t.wrong or any(v is not None for v in (t.local, t.propagated, t.total))]
    marked = [(finding.tap, finding.component) for finding in localization.findings]
    return _errors(taps, marked, "local error") if taps else None


def error_plot(result: Result) -> Plot | None:
    """Return the errors of a comparison over the order of execution, and where it diverges first."""
    taps = [
        TapError(t.tap, UPSTREAM, t.shape, t.dtype, t.difference.rel_l2, None, None, None, t.limit.floor,
                 t.limit.allowed, t.difference.mismatch)
        for t in result.taps if not t.tap.integer
    ]  # fmt: skip
    first = result.first_divergence
    return _errors(taps, [(first["tap"], first["component"])] if first else [], "error") if taps else None


def _errors(taps: Sequence[TapError], marked: Sequence[tuple[str, str]], called: str) -> Plot:
    """Errors over the order of execution; `marked` are taps, and the components to write beside them."""
    caption = f"Errors of {len(taps):,} taps in order of execution, {sum(tap.wrong for tap in taps)} of them wrong"

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        places = np.arange(len(taps))
        bounds = [height(tap.allowed or None) for tap in taps]
        heights = [h for tap in taps for v in (tap.local, tap.total, tap.propagated) if (h := height(v or None)) == h]
        top = 3 * max(heights, default=1.0)
        if any(bound == bound for bound in bounds):
            area = {"step": "mid", "color": theme.line, "lw": 0, "label": "allowed"}
            axes.fill_between(places, LOWEST, bounds, **area)
        thin = 1.0 if len(taps) < 800 else 0.6
        for values, colour, label, width in (
            ([t.total for t in taps], theme.total, "total error of the free run", 3 * thin),
            ([t.propagated for t in taps], theme.propagated, "of which propagated", thin),
        ):
            if any(value is not None for value in values):
                axes.plot(places, [height(v or None) for v in values], color=colour, lw=width, label=label)
        size = 9 if len(taps) < 800 else 4
        for wrong, colour, marker, label, scale in (
            (False, theme.local, "o", called, 1),
            (True, theme.wrong, "X", f"{called}, wrong (at the top: without a number)", 6),
        ):
            points = [(i, _local(tap, top)) for i, tap in enumerate(taps) if tap.wrong is wrong]
            if points:
                options = {"s": size * scale, "c": colour, "marker": marker, "label": label, "lw": 0}
                axes.scatter(*zip(*points, strict=True), **options, zorder=3 + wrong)
        _mark(axes, marked, taps, theme)
        name_calls(axes, [tap.tap.call for tap in taps], theme)
        _logarithmic(axes, [*heights, *(bound for bound in bounds if bound == bound)], theme)
        axes.set_xlim(-1, len(taps))
        axes.set_xlabel("taps in order of execution")
        axes.set_ylabel("relative L2 error")
        figure.legend(**LEGEND)

    return plot("order", caption, (11.5, 5.4), draw)


def trajectory_plot(localization: Localization) -> Plot | None:
    """Return the velocities' errors from the oracle's states, and the error of the free-running state."""
    steps = localization.trajectory
    if not steps:
        return None

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        at = [step.step for step in steps]
        envelope = [height(step.envelope) for step in steps]
        if any(step.envelope is not None for step in steps):
            area = {"color": theme.line, "alpha": 0.6, "lw": 0, "label": "one rounding of the first state"}
            axes.fill_between(at, LOWEST, envelope, **area)
        arms = dict.fromkeys(arm for step in steps for arm in step.velocity)
        for number, arm in enumerate(arms):
            heights = [height(step.velocity.get(arm)) for step in steps]
            style = {"color": theme.arms[number % 3], "marker": "osD"[number % 3], "ls": ("-", "--", ":")[number % 3]}
            axes.plot(at, heights, **style, ms=4, lw=1.2, label=f"velocity {arm}, from the oracle's state")
        if any(step.latent is not None for step in steps):
            heights = [height(step.latent) for step in steps]
            style = {"color": theme.wrong, "marker": "^", "ms": 5, "lw": 1.8}
            axes.plot(at, heights, **style, label="state after the step, free-running")
        shown = [value for step in steps for value in (step.latent, step.envelope, *step.velocity.values())]
        _logarithmic(axes, [h for h in map(height, shown) if h == h], theme)
        axes.set_xticks(*_ticks([f"{step.step}\nt={step.t:.2f}" for step in steps], at))
        axes.set_xlabel("step")
        axes.set_ylabel("relative L2 error")
        figure.legend(**LEGEND)

    return plot("trajectory", f"Error of the trajectory over {len(steps)} steps", (11.5, 4.2), draw)


def margins_plot(localization: Localization) -> Plot | None:
    """Return how far apart the two best logits of each answered token are, and how far off the logits are."""
    tokens = localization.margins
    if not tokens:
        return None

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        at = [token.step for token in tokens]
        margins, errors = [height(t.margin) for t in tokens], [height(2 * t.error) for t in tokens]
        axes.vlines(at, errors, margins, color=theme.line, lw=1.5)
        axes.plot(at, margins, "o", color=theme.local, ms=5, label="margin of the oracle's choice")
        axes.plot(at, errors, "_", color=theme.propagated, ms=10, mew=2, label="what could flip it: twice the error")
        for chosen, marker, colour, label in (
            ([t for t in tokens if t.tie], "s", theme.ink, "tie: rounding decides"),
            ([t for t in tokens if t.expected != t.got], "X", theme.wrong, "another token is chosen"),
        ):
            if chosen:
                hollow = {"mfc": "none"} if marker == "s" else {}
                where = [t.step for t in chosen], [height(t.margin) for t in chosen]
                axes.plot(*where, marker, color=colour, ms=10 if hollow else 7, ls="", label=label, **hollow)
        _logarithmic(axes, [h for h in [*margins, *errors] if h == h], theme)
        axes.set_xticks(*_ticks([str(step) for step in at], at))
        axes.set_xlabel("answered token")
        axes.set_ylabel("logits")
        figure.legend(**LEGEND)

    caption = f"Margins of {len(tokens)} answered tokens and the errors of their logits"
    return plot("margins", caption, (11.5, 3.8), draw)


def map_plot(localization: Localization) -> Plot | None:
    """Return the map of layers and kinds of taps as a picture, over all calls."""
    laid = lay_out(localization)
    if not laid.panels:
        return None
    shades = worst_shades(localization, laid)
    rows = max(len(panel.rows) for panel in laid.panels)
    widths = [len(panel.columns) + 3 for panel in laid.panels]

    def draw(figure: Figure, theme: Theme) -> None:
        many = figure.subplots(1, len(laid.panels), width_ratios=widths, squeeze=False)[0]
        for index, (panel, axes) in enumerate(zip(laid.panels, many, strict=True)):
            cells = np.full((len(panel.rows), len(panel.columns), 3), to_rgb(theme.paper))
            for (place, row, column), step in shades.items():
                if place != index:
                    continue
                cells[row, column] = to_rgb(theme.scale[step])
                if step.startswith("w"):
                    ink = theme.paper if step in ("w3", "w4", "w5", "wi") else theme.ink
                    axes.text(column, row, "×", ha="center", va="center", fontsize=7, color=ink)
            axes.imshow(cells, aspect="auto", interpolation="nearest")
            axes.hlines(np.arange(len(panel.rows)) - 0.5, -0.5, len(panel.columns) - 0.5, color=theme.paper, lw=1)
            axes.vlines(np.arange(len(panel.columns)) - 0.5, -0.5, len(panel.rows) - 0.5, color=theme.paper, lw=1)
            axes.set_title(panel.name, fontsize=9)
            axes.set_xticks(range(len(panel.columns)), [head for head, _ in panel.columns], rotation=90, fontsize=6)
            every = 1 + (len(panel.rows) - 1) // 30
            axes.set_yticks(range(0, len(panel.rows), every), panel.rows[::every], fontsize=6)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)

    return plot("map", "Layers and kinds of taps, coloured by error over floor", (13, 1.8 + 0.16 * min(rows, 48)), draw)


def worst_shades(localization: Localization, laid: Map) -> dict[tuple[int, int, int], str]:
    """Return the step of the scale of every place, the worst over all calls."""
    order = ("none", *STEPS)
    shades: dict[tuple[int, int, int], str] = {}
    steps = [(tap.tap.component, shade(tap.ratio, tap.wrong)) for tap in localization.taps]
    for component, step in [*steps, *exact_shades(localization, laid).items()]:
        place = laid.places[component]
        shades[place] = max(step, shades.get(place, "none"), key=order.index)
    return shades


def exact_shades(localization: Localization, laid: Map) -> dict[str, str]:
    """Return the step of the components that were compared exactly: equal, or of a finding that has no floor."""
    tapped = {tap.tap.component for tap in localization.taps}
    shades = {component: "r0" for component in laid.places if component not in tapped}
    for finding in localization.findings:
        if finding.kind != LOCAL or finding.component in shades:
            shades[finding.component] = "wi"
    return shades


def height(value: float | None) -> float:
    """Return where an error is drawn; NaN, which draws nothing, where there is no number for it."""
    if value is None or not math.isfinite(value):
        return math.nan
    return min(max(value, LOWEST), HIGHEST)


def name_calls(axes: Axes, calls: Sequence[str], theme: Theme) -> None:
    """Draw a line between calls and write the names of those wide enough above."""
    starts = [i for i, call in enumerate(calls) if i == 0 or calls[i - 1] != call]
    free = -math.inf
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(calls)], strict=True)):
        if number:
            axes.axvline(start - 0.5, color=theme.soft, lw=0.4, ls=":", zorder=1)
        middle = (start + stop - 1) / 2
        # A name needs about a fiftieth of the width.
        if middle - free >= len(calls) / 50 and stop - start > len(calls) / 100:
            free = middle
            axes.text(
                middle, 1.01, _clean(calls[start], 24), rotation=50, fontsize=7, ha="left", va="bottom",
                color=theme.soft, transform=axes.get_xaxis_transform(),
            )  # fmt: skip


def _mark(axes: Axes, marked: Sequence[tuple[str, str]], taps: Sequence[TapError], theme: Theme) -> None:
    places = {tap.tap.name: place for place, tap in enumerate(taps)}
    for number, (tap, component) in enumerate(marked, 1):
        place = places.get(tap)
        if place is None or number > 9:
            continue
        axes.axvline(place, color=theme.wrong, lw=0.8, alpha=0.7, zorder=2)
        right = place < len(taps) * 0.6
        text = f"{number}  {_clean(component, 48)}" if number == 1 else str(number)
        axes.annotate(
            text, (place, 0.02 + 0.07 * ((number - 1) % 3)), xycoords=axes.get_xaxis_transform(), color=theme.wrong,
            xytext=(4 if right else -4, 0), textcoords="offset points", ha="left" if right else "right", weight="bold",
        )  # fmt: skip


def _logarithmic(axes: Axes, heights: Iterable[float], theme: Theme) -> None:
    known = list(heights) or [1.0]
    axes.set_yscale("log")
    axes.set_ylim(min(known) / 3, max(known) * 3)
    axes.yaxis.set_major_formatter(POWERS)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color=theme.line, lw=0.6)
    axes.set_axisbelow(True)


def _ticks(labels: Sequence[str], at: Sequence[int]) -> tuple[Sequence[int], Sequence[str]]:
    every = 1 + (len(at) - 1) // 16
    return at[::every], labels[::every]


def _clean(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _local(tap: TapError, top: float) -> float:
    """Return where a tap's local error is drawn: at the top where it has none, for its shape or NaN."""
    value = height(tap.local or None)
    return top if tap.wrong and value != value else value
