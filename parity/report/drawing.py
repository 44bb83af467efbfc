"""How a localization's plots are drawn: once in light and once in dark colours, as PNG, the same for the same input."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

DPI = 130
POWERS = FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e"))


@dataclass(frozen=True)
class Theme:
    """The colours of a plot; `scale` are those of the map by the names of its steps."""

    name: str
    paper: str
    ink: str
    soft: str
    line: str
    local: str
    wrong: str
    propagated: str
    total: str
    arms: tuple[str, str, str]
    bad: str
    scale: dict[str, str]


STEPS = ("r0", "r1", "r2", "w1", "w2", "w3", "w4", "w5", "wi")


def _steps(colours: str) -> dict[str, str]:
    return dict(zip((*STEPS, "none"), colours.split(), strict=True))


# Blue and orange are told apart with every common kind of colour blindness; within each, lightness tells the step.
LIGHT = Theme(
    "light", "#ffffff", "#1c1c1c", "#595959", "#dddddd", "#1d5fa6", "#b3140f", "#b35c00", "#7a7a7a",
    ("#1d5fa6", "#b35c00", "#1c1c1c"), "#d01c8b",
    _steps("#e6eff8 #d3e3f1 #b0cde6 #fdc98b #f9a04a #e8750e #b84e00 #7f2f00 #4a1500 #e4e4e4"),
)  # fmt: skip
DARK = Theme(
    "dark", "#15181c", "#e8e8e8", "#a8adb3", "#33383e", "#6cb2f5", "#ff8f85", "#f0a04b", "#8d939a",
    ("#6cb2f5", "#f0a04b", "#e8e8e8"), "#ff6fc0",
    _steps("#1c2a38 #233d55 #2c5376 #7a4a12 #a8620e #d67d12 #f59f3a #ffc47d #ffe9cc #3a3f45"),
)  # fmt: skip
THEMES = (LIGHT, DARK)


@dataclass(frozen=True)
class Plot:
    """A picture for the page: its PNG in the light and the dark theme, and what it shows for who cannot see it."""

    name: str
    caption: str
    light: bytes
    dark: bytes | None = None


LEGEND = {"loc": "outside lower left", "frameon": False}
"""One entry a line, from the left: in a narrow window, which shows half a plot at a time, it is seen as a whole."""
Draw = Callable[[Figure, Theme], None]


def plot(name: str, caption: str, size: tuple[float, float], draw: Draw) -> Plot:
    """Return a plot of `size` inches, drawn once for each theme; the same input gives the same bytes."""
    return Plot(name, caption, *(_render(size, draw, theme) for theme in THEMES))


def _render(size: tuple[float, float], draw: Draw, theme: Theme) -> bytes:
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor"), theme.ink)
    colours |= dict.fromkeys(("xtick.color", "ytick.color"), theme.soft)
    colours |= {"axes.facecolor": theme.paper, "figure.facecolor": theme.paper, "savefig.facecolor": theme.paper}
    fixed = {"font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    # Names come from files: none of them is to be read as a formula.
    fixed |= {"text.parse_math": False}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg", **colours, **fixed}):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure, theme)
        canvas.draw()
    return compressed(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))


def source(png: bytes) -> str:
    """Return a picture as the source of an <img>."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def compressed(image: Image.Image) -> bytes:
    """Return an image as PNG of at most 256 colours, a third of the size."""
    buffer = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()
