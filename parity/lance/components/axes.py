"""What the axes of a tap are called, in the words that a law is told in."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

WORDS = {
    "1": "batch",
    "hidden": "channel",
    "head_dim": "channel",
    "rgb": "colour",
    "t": "frame",
    "h": "row",
    "w": "column",
    "vocabulary": "token id",
}
"""The names of axes in parity.lance.names that are said in another word."""

CODES = ("batch", "channel", "frame", "row", "column")
WEIGHTS = {
    1: ("channel",),
    2: ("output", "input"),
    4: ("output", "input", "kernel row", "kernel column"),
    5: ("output", "input", "kernel frame", "kernel row", "kernel column"),
}
OTHERS = {1: ("value",), 2: ("row", "column")}


def axes_of(site: "TapProbe") -> tuple[str, ...]:
    """The names of a site's axes, in the singular; () where they are not known."""
    count = site.expected.ndim
    if site.tap.name.startswith("weights/"):
        return WEIGHTS.get(count, ())
    names = [name.strip() for name in site.tap.axes.split(",")] if site.tap.axes else []
    if len(names) == count:
        return tuple(WORDS.get(name, name) for name in names)
    return CODES if count == len(CODES) and site.tap.name.startswith("vae.") else OTHERS.get(count, ())
