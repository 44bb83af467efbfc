"""A measurement of sensitivity on the terminal."""

from parity.bundle.store import sizes
from parity.lance.sensitivity.groups import AS_IS
from parity.lance.sensitivity.measure import Measured
from parity.report.terminal import new_table, print_table

SHOWN = 12
"""Groups that are listed, the worst first."""


def print_measured(measured: Measured) -> None:
    """Print the worst groups, and what everything at one width and the recipe do."""
    widths, cases = measured.plan.widths, measured.plan.inputs.cases
    table = new_table("group", *(f"{bits} bits" for bits in widths), "recipe")
    bits = (
        dict(zip((group.name for group in measured.groups), measured.solved.bits, strict=True))
        if measured.solved
        else {}
    )
    order = sorted(measured.groups, key=lambda group: -measured.cost(group, widths[0]))
    for group in order[:SHOWN]:
        shares = (f"{100 * measured.cost(group, width):.3g} %" for width in widths)
        given = bits.get(group.name)
        table.add_row(group.name, *shares, "" if given is None else "as it is" if given == AS_IS else str(given))
    print_table(table)
    table = new_table("weights", "size", *(case.name for case in cases))
    for width, effects in measured.even.items():
        told = (measured.told(case, each.cost) for case, each in enumerate(effects))
        table.add_row(f"{width} bits everywhere", sizes(measured.size(width)), *told)
    if solved := measured.solved:
        told = (measured.told(case, each.cost) for case, each in enumerate(solved.measured))
        table.add_row("the recipe", sizes(solved.size), *told)
    print_table(table)
