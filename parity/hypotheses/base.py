"""What a hypothesis is, how several are tried together, and how a file's own are read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from parity.errors import ParityError
from parity.laws import Figure
from parity.python_file import import_file

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

Patch = Callable[["TapProbe"], AbstractContextManager[object]]
Transform = Callable[["TapProbe", np.ndarray], np.ndarray | None]


_UNPATCHED: WeakKeyDictionary["TapProbe", np.ndarray] = WeakKeyDictionary()


class DoesNotApply(Exception):
    """Raised by a patch for a site that it has no meaning for."""


def nothing(site: "TapProbe") -> AbstractContextManager[object]:
    """Leave the reference as it is."""
    return nullcontext()


def same(site: "TapProbe", array: np.ndarray) -> np.ndarray:
    """Leave the array as it is."""
    return array


@dataclass(frozen=True)
class Hypothesis:
    """Something that a port may do instead of what upstream does.

    Attributes:
        name: unique, in words that a user understands.
        components: patterns (fnmatch) of the components that it is about.
        patch: changes the reference while a site is computed anew; raises DoesNotApply.
        transform: changes what was computed, in the tap's shape; None where it has no meaning.
        anew: whether `transform` makes the value anew, so that it has to come before those that change it.
        size: how many numbers and choices were read from the data to say it; 0 for what was said beforehand.
        figure: what a page may draw of it.
        describes: whether it says what was computed, number by number, rather than why.
    """

    name: str
    components: tuple[str, ...]
    patch: Patch = nothing
    transform: Transform = same
    anew: bool = False
    size: float = 0.0
    figure: Figure | None = field(default=None, repr=False, compare=False)
    describes: bool = False

    def about(self, component: str) -> bool:
        """Whether a component is one of those that this is about."""
        return any(fnmatchcase(component, pattern) for pattern in self.components)


def attempt(site: "TapProbe", hypotheses: Sequence[Hypothesis]) -> np.ndarray | None:
    """What the reference computes at a site under hypotheses, the first patched first; None where they do not apply."""
    if sum(hypothesis.anew for hypothesis in hypotheses) > 1:
        # The later one would undo the earlier.
        return None
    try:
        with ExitStack() as stack:
            for hypothesis in hypotheses:
                stack.enter_context(hypothesis.patch(site))
            array = unpatched(site) if all(each.patch is nothing for each in hypotheses) else recomputed(site)
            for hypothesis in sorted(hypotheses, key=lambda each: not each.anew):
                if array is not None:
                    array = hypothesis.transform(site, array)
    except DoesNotApply:
        return None
    return array


def recomputed(site: "TapProbe") -> np.ndarray:
    """What the reference computes at a site; the oracle's value where it never comes to it."""
    try:
        return site.recompute()
    except LookupError:
        return site.expected


def unpatched(site: "TapProbe") -> np.ndarray:
    """What the reference computes at a site as it is: the same however often it is asked for."""
    if site not in _UNPATCHED:
        _UNPATCHED[site] = recomputed(site)
    return _UNPATCHED[site].copy()


def check_unique(hypotheses: Sequence[Hypothesis]) -> list[Hypothesis]:
    """Return the hypotheses as a list; raises ParityError when two have one name."""
    names = [hypothesis.name for hypothesis in hypotheses]
    for name in names:
        if names.count(name) > 1:
            raise ParityError(f"two hypotheses are called {name!r}: rename one of them")
    return list(hypotheses)


def load_hypotheses(path: Path) -> list[Hypothesis]:
    """Return the Hypothesis objects, and those in lists, at the top of a Python file, in their order.

    Raises ParityError when the file cannot be read or run, or holds none, or two of one name.
    """
    module = import_file(path, "hypotheses")
    found = list(_hypotheses_in(vars(module).values()))
    if not found:
        raise ParityError(f"{path} holds no Hypothesis: make some at the top of the file")
    return check_unique(found)


def _hypotheses_in(values: object) -> Iterator[Hypothesis]:
    seen: list[Hypothesis] = []
    for value in values:
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, Hypothesis) and not any(item is other for other in seen):
                seen.append(item)
                yield item
