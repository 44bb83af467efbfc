"""Pictures of single taps: heat maps and curves of the oracle's values beside ours, and frames side by side."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image

from parity.localize.findings import Picture
from parity.model import definition
from parity.report.drawing import POWERS, Plot, Theme, plot

FRAMES = 4
FRAME_SIDE = 256
# A heat map has no more cells in a direction than a screen can show.
CELLS = 400
LINES = 4


@dataclass(frozen=True)
class View:
    """A tap as a matrix: its rows and columns are named axes, the others are summed up as a root mean square."""

    rows: str
    columns: str
    expected: np.ndarray
    got: np.ndarray
    difference: np.ndarray
    summed: tuple[str, ...]

    @property
    def title(self) -> str:
        """The axes, and which are summed up."""
        over = f", root mean square over {' and '.join(self.summed)}" if self.summed else ""
        return f"{self.columns} by {self.rows}{over}"


@dataclass(frozen=True)
class Frame:
    """One frame as PNG: the oracle's, ours and the difference side by side, with what there is to say about it."""

    number: int
    png: bytes
    error: float
    largest: float


@dataclass(frozen=True)
class Frames:
    """A few frames of a clip; differences are drawn `factor` times as large as they are, grey where there is none."""

    tap: str
    frames: list[Frame]
    total: int
    factor: float

    @property
    def worst(self) -> Frame:
        """The frame with the largest error."""
        return max(self.frames, key=lambda frame: frame.error)


def axis_names(picture: Picture) -> list[str]:
    """Return the names of a picture's axes, numbered ones where the registry gives none of as many."""
    names = [name.strip() for name in picture.tap.axes.split(",")]
    dimensions = picture.expected.ndim
    if not picture.tap.axes:
        names = definition().axes_within(picture.tap.component, dimensions)
    return names if len(names) == dimensions and all(names) else [f"axis {index}" for index in range(dimensions)]


def is_frames(picture: Picture) -> bool:
    """Tell whether a picture is one of pixels."""
    return {"rgb", "h", "w"} <= set(axis_names(picture)) and picture.expected.shape == picture.got.shape


def picture_plot(picture: Picture, name: str) -> Plot | None:
    """Return a tap drawn beside the oracle's, as curves or heat maps; None where nothing can be drawn."""
    if picture.expected.shape != picture.got.shape or not picture.expected.size or not picture.expected.ndim:
        return None
    axes = axis_names(picture)
    expected, got = np.float64(picture.expected), np.float64(picture.got)
    long = [(index, size) for index, size in enumerate(expected.shape) if size > 1]
    flat = len(long) < 2 or (picture.tap.integer and expected.ndim == 2 and expected.shape[0] <= LINES)
    if flat:
        lines = expected.shape[0] if len(long) > 1 else 1
        labels = (axes[0], axes[-1]) if lines > 1 else ("", axes[long[0][0]] if long else axes[-1])
        if picture.tap.integer and lines == 3:
            labels = ("t h w".split(), axes[-1])
        return _curves(name, picture, expected.reshape(lines, -1), got.reshape(lines, -1), *labels)
    views = [_view(expected, got, axes, *pair) for pair in _pairs(axes, expected.shape)]
    return _heat_maps(name, picture, views)


def _pairs(axes: Sequence[str], shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return which two axes make the rows and the columns of each heat map."""
    size = dict(zip(axes, shape, strict=True))
    index = {axis: place for place, axis in enumerate(axes)}
    wanted = []
    if "head" in index:
        wanted += [("head", "token"), ("head", "patch"), ("head", "head_dim")]
    if {"channel", "h", "w"} <= set(axes):
        # Of a single frame the rows of pixels are told apart instead.
        time = next((axis for axis in ("t", "frame") if size.get(axis, 0) > 1), "h")
        wanted += [(time, "channel"), ("h", "w")]
    pairs = [(index[a], index[b]) for a, b in wanted if size.get(a, 0) > 1 and size.get(b, 0) > 1]
    if pairs:
        return pairs
    rows, *_, columns = [place for place, length in enumerate(shape) if length > 1]
    # The longer axis lies along the page.
    return [(rows, columns) if shape[columns] >= shape[rows] / 3 else (columns, rows)]


def _view(expected: np.ndarray, got: np.ndarray, axes: Sequence[str], rows: int, columns: int) -> View:
    others = tuple(place for place in range(expected.ndim) if place not in (rows, columns))
    with np.errstate(invalid="ignore"):
        apart = got - expected

    def matrix(array: np.ndarray) -> np.ndarray:
        summed = any(array.shape[place] > 1 for place in others)
        flat = np.sqrt(np.mean(array**2, axis=others)) if summed else array.squeeze(others)
        return flat if rows < columns else flat.T

    summed = tuple(axes[place] for place in others if expected.shape[place] > 1)
    with np.errstate(all="ignore"):
        matrices = [matrix(array) for array in (expected, got, np.abs(apart))]
    return View(axes[rows], axes[columns], *matrices, summed)


def binned(matrix: np.ndarray, cells: int = CELLS) -> np.ndarray:
    """Return a matrix of at most `cells` rows and columns: of neighbours the one that is largest, or not finite."""
    for axis in range(2):
        step = -(-matrix.shape[axis] // cells)
        if step > 1:
            starts = np.arange(0, matrix.shape[axis], step)
            with np.errstate(invalid="ignore"):
                low, high = (way.reduceat(matrix, starts, axis=axis) for way in (np.minimum, np.maximum))
            matrix = np.where(np.abs(low) > np.abs(high), low, high)
    return matrix


def _heat_maps(name: str, picture: Picture, views: Sequence[View]) -> Plot:
    drawn = [[binned(m) for m in (view.expected, view.got, view.difference)] for view in views]
    # A map of few rows is drawn low.
    heights = [min(max(0.16 * matrices[0].shape[0], 0.9), 3.0) for matrices in drawn]

    def draw(figure: Figure, theme: Theme) -> None:
        grid = figure.subplots(len(views), 3, squeeze=False, height_ratios=heights)
        for view, matrices, line in zip(views, drawn, grid, strict=True):
            _draw_view(figure, theme, view, matrices, line)

    caption = f"{picture.tap.name}: " + "; ".join(view.title for view in views)
    return plot(name, caption, (12, sum(heights) + 1.0 * len(views)), draw)


def _draw_view(figure: Figure, theme: Theme, view: View, matrices: Sequence[np.ndarray], line: Sequence) -> None:
    finite = [m[np.isfinite(m)] for m in matrices]
    signed = any((values < 0).any() for values in finite[:2])
    reach = max((np.abs(values).max() for values in finite[:2] if values.size), default=1.0) or 1.0
    apart = finite[2][finite[2] > 0]
    top = apart.max() if apart.size else 1.0
    # Two to four decades: less would make much of little, more would show rounding beside what is wrong.
    scale = LogNorm(max(min(apart.min(initial=top), top / 1e2), top / 1e4), top)
    # The maps are labelled with the numbers of the tap itself, however many lie in one cell.
    rows, columns = view.expected.shape
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    for axes, matrix, title in zip(line, matrices, ("oracle", "ours", "absolute difference"), strict=True):
        if title == "absolute difference":
            options = {"cmap": "cividis", "norm": scale}
            matrix = np.where(matrix == 0, scale.vmin, matrix)
        elif signed:
            options = {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach}
        else:
            options = {"cmap": "cividis", "vmin": 0, "vmax": reach}
        options["cmap"] = colormaps[options["cmap"]].with_extremes(bad=theme.bad)
        shown = np.ma.masked_invalid(matrix)
        image = axes.imshow(shown, aspect="auto", interpolation="nearest", extent=extent, **options)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(view.columns)
        axes.spines[:].set_visible(False)
        axes.locator_params(integer=True, nbins=6)
        powers = {"format": POWERS} if title == "absolute difference" else {}
        beside = figure.colorbar(image, ax=axes, pad=0.01, aspect=30, **powers)
        beside.outline.set_visible(False)
        beside.ax.yaxis.set_minor_formatter(NullFormatter())
    line[0].set_ylabel(view.rows)


def _curves(
    name: str, picture: Picture, expected: np.ndarray, got: np.ndarray, labels: str | Sequence[str], along: str
) -> Plot:
    lines = len(expected)
    rows = [labels[n] if not isinstance(labels, str) else f"{labels} {n}" if labels else "" for n in range(lines)]

    def draw(figure: Figure, theme: Theme) -> None:
        column = figure.subplots(lines, sharex=True, squeeze=False)[:, 0]
        for axes, ours, theirs, label in zip(column, got, expected, rows, strict=True):
            marks = {"marker": "."} if ours.size <= 80 else {}
            axes.plot(theirs, color=theme.total, lw=3.2, alpha=0.6, label="oracle")
            axes.plot(ours, color=theme.local, lw=1.1, label="ours", **marks)
            apart = np.flatnonzero((ours != theirs) & ~(np.isnan(ours) & np.isnan(theirs)))
            if picture.tap.integer and len(apart):
                low = np.nanmin([np.nanmin(ours), np.nanmin(theirs)])
                axes.plot(apart, np.full(len(apart), low), "|", color=theme.wrong, ms=7, label="differs")
            axes.set_ylabel(label, rotation=0, ha="right", va="center")
            axes.grid(axis="y", color=theme.line, lw=0.6)
        axes.set_xlabel(along)
        handles = {h.get_label(): h for ax in figure.axes for h in ax.get_lines()}
        figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=3, frameon=False)

    return plot(name, f"{picture.tap.name} along {along}", (11.5, 1.0 + 1.3 * lines), draw)


def frames_of(picture: Picture) -> Frames:
    """Return a few frames of a pixels picture (see is_frames): the first, the last, the worst and others between."""
    expected, got = _clip(picture, picture.expected), _clip(picture, picture.got)
    with np.errstate(invalid="ignore"):
        apart = got - expected
    finite = np.where(np.isfinite(apart), apart, 0)
    largest = np.abs(finite).max(axis=(1, 2, 3))
    norms = np.linalg.norm(expected.reshape(len(expected), -1), axis=1)
    errors = np.linalg.norm(finite.reshape(len(finite), -1), axis=1) / np.where(norms > 0, norms, 1)
    # Pixels of the model are in [-1, 1], those of a file in 0 to 255.
    low, high = (0.0, 255.0) if np.nanmax(np.abs(expected), initial=0) > 2 else (-1.0, 1.0)
    expected, got, apart = (expected - low) / (high - low), (got - low) / (high - low), apart / (high - low)
    chosen = {0, len(got) - 1, int(errors.argmax()), *np.linspace(0, len(got) - 1, FRAMES).round().astype(int)}
    # The worst frame takes the place of one between.
    keep = sorted(chosen) if len(chosen) <= FRAMES else sorted({0, len(got) - 1, int(errors.argmax()), len(got) // 2})
    # The largest round factor with which the largest difference still fits between grey and white.
    fits = 0.5 * (high - low) / (largest.max() or np.inf)
    power = 10.0 ** np.floor(np.log10(max(fits, 1)))
    factor = max(power * digit for digit in (1, 2, 5) if power * digit <= max(fits, 1))
    frames = []
    for number in keep:
        panels = [expected[number], got[number], 0.5 + factor * apart[number]]
        frames.append(Frame(int(number), _png(panels), float(errors[number]), float(largest[number])))
    return Frames(picture.tap.name, frames, len(got), float(factor))


def _clip(picture: Picture, array: np.ndarray) -> np.ndarray:
    """Return pixels as float64 [frame, h, w, rgb]."""
    axes = axis_names(picture)
    array = np.float64(array)
    time = next((axis for axis in ("frame", "t") if axis in axes), None)
    order = [axes.index(axis) for axis in (time, "h", "w", "rgb") if axis is not None]
    order = [place for place in range(array.ndim) if place not in order] + order
    array = array.transpose(order)
    return array.reshape(-1, *array.shape[-3:])


def _png(panels: Sequence[np.ndarray]) -> bytes:
    images = []
    for panel in panels:
        # NaN is drawn black, infinity as the end of the scale.
        levels = np.nan_to_num(np.clip(panel, 0, 1), nan=0.0) * 255
        image = Image.fromarray(levels.round().astype(np.uint8))
        image.thumbnail((FRAME_SIDE, FRAME_SIDE), Image.Resampling.BOX)
        images.append(image)
    gap = max(1, images[0].width // 32)
    strip = Image.new("RGBA", (sum(image.width for image in images) + 2 * gap, images[0].height))
    for place, image in enumerate(images):
        strip.paste(image, (place * (image.width + gap), 0))
    buffer = io.BytesIO()
    strip.save(buffer, format="png", optimize=True)
    return buffer.getvalue()
