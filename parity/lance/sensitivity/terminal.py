"""A measurement of sensitivity on the terminal."""

from parity.bundle.store import sizes
from parity.lance.sensitivity.groups import AS_IS
from parity.lance.sensitivity.measured import Measured
from parity.report.terminal import new_table, print_table

SHOWN = 12
"""Groups that are listed, the worst first."""


def print_measured(measured: Measured) -> None:
    """Print the worst groups, and what everything at one width and the recipe do."""
    widths, cases = measured.plan.widths, measured.plan.inputs.cases
    table = new_table("group", *(f"{bits} bits" for bits in widths), "recipe")
    names, solved = (group.name for group in measured.groups), measured.solved
    bits = dict(zip(names, solved.bits, strict=True)) if solved else {}
    order = sorted(measured.groups, key=lambda group: -measured.cost(group, widths[0]))
    for group in order[:SHOWN]:
        shares = (
            f"{100 * measured.cost(group, width):.3g} %" + behind(measured.wins(group, width)) for width in widths
        )
        given = bits.get(group.name)
        recipe = "" if given is None else "as it is" if given == AS_IS else str(given)
        table.add_row(group.name, *shares, recipe + behind(solved is not None and group.name in solved.scaled))
    print_table(table)
    table = new_table("weights", "size", *(case.name for case in cases))
    for scaled, even in ((False, measured.even), (True, measured.even_scaled)):
        for width, effects in even.items():
            told = (measured.told(case, each.cost) for case, each in enumerate(effects))
            table.add_row(f"{width} bits everywhere{behind(scaled)}", sizes(measured.size(width)), *told)
    if solved:
        told = (measured.told(case, each.cost) for case, each in enumerate(solved.measured))
        table.add_row("the recipe", sizes(solved.size), *told)
    print_table(table)


def behind(scaled: bool) -> str:
    """What marks that weights are quantized behind scales."""
    return ", scaled" if scaled else ""
