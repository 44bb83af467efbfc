"""The page of a measurement of sensitivity: map, frontier, recipe, all runs."""

from dataclasses import dataclass

from parity.bundle.store import sizes as in_words
from parity.lance.sensitivity.groups import AS_IS
from parity.lance.sensitivity.measured import Measured
from parity.report.run_page import page_environment

_WIDTH, _HEIGHT, _EDGE = 640.0, 240.0, 44.0
_POINTS = 80


@dataclass(frozen=True)
class Row:
    """A group: its cost at each width, whether behind scales, how dark each cell is in per cent, and the bits that the
    recipe gives it."""

    name: str
    weights: int
    costs: tuple[float, ...]
    scaled: tuple[bool, ...]
    shades: tuple[int, ...]
    bits: int | None
    unread: bool


def rows_of(measured: Measured) -> list[Row]:
    """All groups in their order."""
    widths = measured.plan.widths
    most = max(measured.cost(group, widths[0]) for group in measured.groups) or 1.0
    rows = []
    for number, group in enumerate(measured.groups):
        costs = tuple(measured.cost(group, bits) for bits in widths)
        # Errors, roots of costs: a tenth of the largest is still seen.
        shades = tuple(round(100 * min(cost / most, 1.0) ** 0.5) for cost in costs)
        bits = measured.solved.bits[number] if measured.solved else None
        scaled = tuple(measured.wins(group, bits) for bits in widths)
        rows.append(Row(group.name, group.weights, costs, scaled, shades, bits, group.name in measured.unread))
    return rows


def curve_of(measured: Measured) -> dict:
    """The frontier, the even widths and the recipe as points of a drawing, by size and by error."""
    points = [(size, cost**0.5) for size, cost in measured.frontier]
    step = max(1, len(points) // _POINTS)
    points = points[::step] + points[-1:]
    evens = [(measured.size(bits), measured.cost_of_all(bits) ** 0.5, f"{bits} bits") for bits in measured.plan.widths]
    found = [(measured.solved.size, measured.solved.choice.cost**0.5, "recipe")] if measured.solved else []
    held = [x for x, *_ in (*points, *evens)]
    low, span = min(held), max(held) - min(held) or 1
    most = max(y for _, y, *_ in (*points, *evens)) or 1.0

    def placed(x: float, y: float) -> tuple[float, float]:
        across = _EDGE + (x - low) / span * (_WIDTH - 2 * _EDGE)
        return round(across, 1), round(_HEIGHT - _EDGE - y / most * (_HEIGHT - 2 * _EDGE), 1)

    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "edge": _EDGE,
        "line": " ".join("{},{}".format(*placed(*point)) for point in points),
        "marks": [(*placed(x, y), name) for x, y, name in evens + found],
        "sizes": (in_words(low), in_words(low + span)),
    }


def page_of(measured: Measured) -> str:
    """The page as HTML; it needs no other file."""
    environment = page_environment()
    environment.filters["bytes"] = in_words
    environment.filters["bits"] = lambda bits: "–" if bits is None else "as it is" if bits == AS_IS else f"{bits} bits"
    return environment.get_template("sensitivity.html").render(
        measured=measured,
        plan=measured.plan,
        solved=measured.solved,
        rows=rows_of(measured),
        curve=curve_of(measured),
        cases=measured.plan.inputs.cases,
    )
