"""Names of a pair's taps, as the engine sees them."""

import os
import re
from functools import cache

from parity.pairs.sides import IN
from parity.tensors.names import TapName, starred

WEIGHTS = "weights/"


@cache
def parse(name: str) -> TapName:
    """The parts of a tap's name; its component is the part that makes it, or that reads it."""
    call, _, path = name.partition("/")
    component, _, what = re.sub(r"#\d+$", "", path).partition(":")
    component = re.sub(r"#\d+$", "", component)
    if what:
        what = f"{component} ({'input' if what == IN[1:] else what})"
    if name.startswith(WEIGHTS):
        component = component.rpartition(".")[0]
    number = next((int(part) for part in component.split(".") if part.isdigit()), None)
    numbers = {} if number is None else {"layer": number}
    said = what or component
    return TapName(name, call, path, said, said, "", False, "", numbers, ())


@cache
def kind_of(name: str) -> str:
    """What makes or reads a tap, whichever layer or block it is in."""
    return starred(parse(name).component)


def owner_of(name: str) -> str:
    """The tap of what the part that reads a tap makes; a tap of a result is its own."""
    return name.partition(":")[0] + (f"#{name.rpartition('#')[2]}" if "#" in name.partition(":")[2] else "")


def relative(name: str, to: str) -> str:
    """What a tap is called beside another: without the path of what holds both."""
    path, block, shared = _apart(name, to)
    last, _, what = ".".join(path[shared:]).partition(":")
    if shared == len(block) and not last:
        last = "the block"
    # What is all that the two share.
    last = last or path[shared - 1]
    again = "another call of " if "#" in name else ""
    return again + (f"the input of {last}" if what == IN[1:] else f"{last} ({what})" if what else last)


def distance(name: str, to: str) -> tuple[int, bool, int]:
    """How far from another tap one is: by how many blocks around that do not hold it; then results before inputs."""
    path, block, shared = _apart(name, to)
    inner = ".".join(path[shared:])
    return len(block) - shared, ":" in name and bool(inner.partition(":")[0]), len(inner)


def _apart(name: str, to: str) -> tuple[list[str], list[str], int]:
    """A tap's path, that of the block that another is in, and how many parts the two share."""
    path, there = (re.sub(r"#\d+", "", each.partition("/")[2]) for each in (name, to))
    stem, colon, what = path.partition(":")
    parts, block = stem.split("."), there.partition(":")[0].split(".")[:-1]
    # A layer's own result is made of what is inside of it.
    block = there.partition(":")[0].split(".") if ":" not in there and "." in there and there[-1].isdigit() else block
    shared = len(os.path.commonprefix([parts, block]))
    parts[-1] += colon + what
    if shared == len(parts):
        parts = [*parts[:-1], stem.split(".")[-1], colon + what]
    return parts, block, shared
