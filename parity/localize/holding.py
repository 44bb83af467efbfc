"""Where a cause holds among the compared taps of its kind: in which layers, arms, calls and steps."""

import re
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from parity.laws.support import spans
from parity.model import definition
from parity.tensors.names import TapName

LISTED = 4
_NUMBERED = ("step", "index", "chunk", "number")


def holding(wrong: Sequence[TapName], compared: Sequence[TapName]) -> str | None:
    """Say where some taps of one kind lie among all that were compared; None where it is everywhere.

    "in layers.1 only", "from step 2 on".
    """
    names = {tap.name for tap in wrong}
    if all(tap.name in names for tap in compared):
        return None
    said: dict[str, str] = {}
    within = list(compared)
    for side, of, words in _SIDES:
        hit = {of(tap) for tap in within if tap.name in names}
        if hit < {of(tap) for tap in within}:
            if text := words([of(tap) for tap in within], hit):
                said[side] = text
            within = [tap for tap in within if of(tap) in hit]
    if "number" in said and said.get("part") == "in the step calls only":
        # Which steps says that it is steps.
        del said["part"]
    if len(within) > len(names):
        said["taps"] = f"in {len(names)} of {len(within)} taps{' there' if said else ''}"
    return ", ".join(said.values()) or None


def _component(tap: TapName) -> Hashable:
    return tap.component


def _arm(tap: TapName) -> Hashable:
    return definition().arm_of(tap)


def _part(tap: TapName) -> Hashable:
    """The kind of call: step, prefix."""
    return re.sub(r"\d+", "", tap.call.rpartition(".")[2])


def _number(tap: TapName) -> Hashable:
    return next(((key, tap.numbers[key]) for key in _NUMBERED if key in tap.numbers), None)


def _components(all_of: Sequence[str], hit: set[str]) -> str:
    numbers = [re.match(r"([a-z_]+)\.(\d+)(?:\.|$)", name) for name in dict.fromkeys(all_of)]
    if (
        all(numbers)
        and len({found[1] for found in numbers}) == 1
        and len({found[2] for found in numbers}) == len(numbers)
    ):
        group = numbers[0][1]
        which = {int(found[2]) for found in numbers if found.string in hit}
        if len(which) == 1:
            return f"in {group}.{which.pop()} only"
        return _counted(group.removesuffix("s"), [int(found[2]) for found in numbers], which)
    if len(hit) > LISTED:
        return f"in {len(hit)} of {len(numbers)} components"
    return f"in {' and '.join(name for name in dict.fromkeys(all_of) if name in hit)} only"


def _arms(all_of: Sequence[str], hit: set[str]) -> str:
    named = sorted(definition().ARMS.get(arm, arm) for arm in hit if arm)
    return f"in the {' and '.join(named)} arm only" if named else ""


def _parts(all_of: Sequence[str], hit: set[str]) -> str:
    return f"in the {' and '.join(sorted(hit))} calls only"


def _numbers(all_of: Sequence[Hashable], hit: set[Hashable]) -> str:
    keys = {item[0] for item in all_of if item}
    if len(keys) != 1 or None in hit:
        return ""
    key = keys.pop()
    which = {item[1] for item in hit}
    name = {"index": "call"}.get(key, key)
    if len(which) == 1:
        return f"in {name} {which.pop()} only"
    return _counted(name, sorted({item[1] for item in all_of if item}), which)


def _counted(name: str, all_of: Sequence[int], hit: set[int]) -> str:
    """Numbers among others, in words: from step 2 on, in layers 0 and 2."""
    numbers = sorted(set(all_of))
    # Two are listed, unless they are the last ones.
    if len(hit) == 2 and numbers[-2:] != sorted(hit):
        return f"in {name}s {' and '.join(map(str, sorted(hit)))}"
    chosen = np.isin(np.arange(numbers[-1] + 1), list(hit)) if numbers == list(range(len(numbers))) else None
    if chosen is not None and (found := spans(name, chosen)):
        return found[0].within
    return f"in {name}s {', '.join(map(str, sorted(hit)))}"


_SIDES: tuple[tuple[str, Callable[[TapName], Hashable], Callable], ...] = (
    ("component", _component, _components),
    ("arm", _arm, _arms),
    ("part", _part, _parts),
    ("number", _number, _numbers),
)
