"""Names of taps, as the engine sees them; a model's definition says what they mean."""

from dataclasses import dataclass
from functools import cache

from parity.model import definition


@dataclass(frozen=True)
class TapName:
    """A parsed tap name: its call and path, its component as a user knows it, its numbers (layer, step, chunk ...).

    `most` is the largest absolute value that such a tap can have, None where there is none.
    """

    name: str
    call: str
    path: str
    component: str
    what: str
    axes: str
    integer: bool
    arm: str
    numbers: dict[str, int]
    place: tuple[int, ...]
    most: float | None = None

    @property
    def layer(self) -> int | None:
        """The index of the decoder layer, or None outside the layers."""
        return self.numbers.get("layer")


def parse(name: str) -> TapName:
    """Return the parts of a tap name; raises ParityError for a name that the model does not describe."""
    return definition().parse(name)


@cache
def component_kind(name: str) -> str:
    """What computes a tap, whichever layer or block it is."""
    return starred(parse(name).component)


def starred(component: str) -> str:
    """A component with a star for every number."""
    return ".".join("*" if part.isdigit() else part for part in component.split("."))
