"""Pictures of laws: a curve found beside the one expected, matrices side by side."""

import numpy as np
from matplotlib.figure import Figure

from parity.laws import Curves, Matrices
from parity.laws import Figure as LawFigure
from parity.report.drawing import LEGEND, Plot, Theme, plot

# Beyond so many points a line has no markers, and beyond so many cells a side a matrix is thinned out.
MARKED, CELLS = 64, 512


def law_plot(shown: LawFigure, name: str, caption: str) -> Plot:
    """The picture of a law; `name` is its file's."""
    if isinstance(shown, Curves):
        return plot(name, f"{caption}: {shown.title}", (7.5, 3.2), lambda figure, theme: _curves(figure, theme, shown))
    size = (min(3.4 * len(shown.panels) + 1.2, 11.5), 3.4)
    return plot(name, f"{caption}: {shown.title}", size, lambda figure, theme: _matrices(figure, theme, shown))


def _curves(figure: Figure, theme: Theme, shown: Curves) -> None:
    axes = figure.subplots()
    colours = {"expected": theme.total, "found": theme.wrong}
    others = iter([theme.local, theme.propagated, *theme.arms] * len(shown.lines))
    for label, values in shown.lines.items():
        width, marker = (2.6, "") if label == "expected" else (1.2, "." if len(shown.x) <= MARKED else "")
        axes.plot(shown.x, values, color=colours.get(label) or next(others), lw=width, marker=marker, label=label)
    axes.set_xlabel(shown.x_label)
    axes.set_ylabel(shown.y_label)
    figure.legend(**LEGEND)


def _matrices(figure: Figure, theme: Theme, shown: Matrices) -> None:
    panels = {name: _thinned(np.asarray(values, np.float64)) for name, values in shown.panels.items()}
    finite = np.concatenate([values[np.isfinite(values)] for values in panels.values()] or [np.zeros(1)])
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    spread = {"vmin": min(low, 0.0), "vmax": high, "cmap": "viridis"}
    if low < 0 < high:
        spread = {"vmin": -max(-low, high), "vmax": max(-low, high), "cmap": "RdBu_r"}
    places = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, values) in zip(places, panels.items(), strict=True):
        image = axes.imshow(values, aspect="auto", interpolation="nearest", **spread)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(shown.x_label)
    places[0].set_ylabel(shown.y_label)
    figure.colorbar(image, ax=list(places))


def _thinned(values: np.ndarray) -> np.ndarray:
    rows, columns = (np.unique(np.linspace(0, size - 1, min(size, CELLS)).astype(int)) for size in values.shape)
    return values[np.ix_(rows, columns)]
