"""The plot of a comparison's page: errors over the order of execution."""

import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402 - the backend is chosen first: no display is needed

from parity.comparison.check import Result, TapResult  # noqa: E402

# Errors below this one, exact agreement included, are drawn on the lowest line.
LOWEST = 1e-9
AGREES, DIVERGES, LIMIT, FLOOR = "#1d5fa6", "#b3140f", "#8a4b00", "#6b6b6b"


def error_plot(result: Result) -> str:
    """Return an inline SVG of the relative L2 error of every float tap, with its limit and the first divergence."""
    taps = [tap for tap in result.taps if not tap.tap.integer]
    figure, axes = pyplot.subplots(figsize=(11, 5), layout="constrained")
    try:
        places = range(len(taps))
        bounds = [max(tap.limit.allowed, LOWEST) for tap in taps]
        axes.step(places, bounds, where="mid", color=LIMIT, lw=1.2, ls="--", label="largest that agrees")
        if any(tap.limit.upstream for tap in taps):
            floors = [max(tap.limit.upstream or 0.0, LOWEST) for tap in taps]
            axes.step(places, floors, where="mid", color=FLOOR, lw=0.8, ls=":", label="upstream's own rounding")
        for diverges, colour, marker, label in (
            (False, AGREES, "o", "agrees"),
            (True, DIVERGES, "X", "diverges"),
        ):
            points = [(i, _height(tap)) for i, tap in enumerate(taps) if tap.diverges is diverges]
            if points:
                axes.scatter(*zip(*points, strict=True), s=30 if diverges else 9, c=colour, marker=marker, label=label)
        _mark_first(axes, result, taps)
        _name_calls(axes, taps)
        axes.set_yscale("log")
        axes.set_ylim(LOWEST / 2, max([1.0, *(3 * _height(tap) for tap in taps)]))
        axes.set_xlim(-1, max(len(taps), 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("relative L2 error")
        axes.set_xlabel("taps in order of execution")
        axes.grid(axis="y", color="#dddddd", lw=0.6)
        figure.legend(loc="outside lower center", fontsize=9, ncols=4, frameon=False)
        with io.StringIO() as buffer:
            pyplot.rcParams["svg.hashsalt"] = result.bundle
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            svg = buffer.getvalue()
    finally:
        pyplot.close(figure)
    # The XML prolog names a DTD by its address, and has no place inside HTML.
    return svg[svg.index("<svg") :]


def _height(tap: TapResult) -> float:
    error = tap.difference.rel_l2
    return 1.0 if error is None else min(max(error, LOWEST), 1e6)


def _mark_first(axes: pyplot.Axes, result: Result, taps: Sequence[TapResult]) -> None:
    first = result.first_divergence and result.first_divergence["tap"]
    place = next((i for i, tap in enumerate(taps) if tap.tap.name == first), None)
    if place is None:
        return
    axes.axvline(place, color=DIVERGES, lw=1)
    right = place < len(taps) / 2
    axes.annotate(
        f"first divergence: {result.first_divergence['component']}",
        (place, LOWEST * 3),
        xytext=(6 if right else -6, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        color=DIVERGES,
        fontsize=9,
        weight="bold",
    )


def _name_calls(axes: pyplot.Axes, taps: Sequence[TapResult]) -> None:
    starts = [i for i, tap in enumerate(taps) if i == 0 or taps[i - 1].tap.call != tap.tap.call]
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(taps)], strict=True)):
        if number % 2:
            axes.axvspan(start - 0.5, stop - 0.5, color="#f1f1f1", lw=0, zorder=0)
        # A name needs about a fortieth of the width to be readable.
        if stop - start > len(taps) / 40:
            middle = (start + stop - 1) / 2
            axes.text(
                middle, 1.01, taps[start].tap.call, rotation=45, fontsize=8, ha="left", va="bottom", color="#444444",
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
