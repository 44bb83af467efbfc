"""What lance-parity shows in the terminal: tables, verdicts and progress."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from parity.comparison.check import Result
from parity.comparison.verdict import AGREE, DIVERGE, INCONCLUSIVE, UNUSABLE
from parity.oracle.floors import FLOORS
from parity.report.run_page import SYMBOLS, UNSUPPORTED, Row, counted, error_of, estimates, first_line, significant

STYLES = {AGREE: "green", DIVERGE: "bold red", INCONCLUSIVE: "bold yellow", UNUSABLE: "bold yellow", UNSUPPORTED: "dim"}


@contextmanager
def progress_bar(total: int, unit: str) -> Iterator[Callable[[str], Callable[[str], None]]]:
    """Show a bar on stderr, where that is a terminal.

    What it yields is called with the name of each item as it starts, and returns the callback for that item's calls.
    """
    with tqdm(total=total, unit=unit, leave=False, dynamic_ncols=True, disable=None) as bar:
        started = 0

        def start(name: str) -> Callable[[str], None]:
            nonlocal started
            bar.update(started - bar.n)
            started += 1
            bar.set_description(name)
            return partial(_tell, bar, name)

        yield start
        bar.update(started - bar.n)


def _tell(bar: tqdm, name: str, what: str) -> None:
    """Show what is being done; where there is no bar only what takes minutes, and what is to stay in any case."""
    if not bar.disable:
        bar.set_postfix_str(what)
    numbered = re.match(rf"{FLOORS} (\d+) of ", what)
    if numbered and numbered[1] == "1":
        bar.write(f"{name}: measuring what rounding does, once on this machine", sys.stderr)
    if numbered and bar.disable or not numbered and what.startswith(f"{FLOORS} "):
        bar.write(f"{name}: {what}", sys.stderr)


def new_console(**options: Any) -> Console:
    """A console that shows text as it is: names and messages may hold brackets and colons."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def print_rows(rows: Sequence[Row]) -> None:
    """Print the table of a run."""
    table = new_table("bundle", "implementation", "dtype", "taps", "worst tap", "error", "verdict")
    for row in rows:
        worst = row.result.worst if row.result else None
        table.add_row(
            row.bundle,
            row.impl,
            row.dtype,
            str(row.result.compared) if row.result else "0",
            worst.tap.name if worst else "",
            error_of(worst.difference) if worst else "",
            styled(row.verdict, row.message),
        )
    print_table(table)


def print_result(result: Result) -> None:
    """Print what one comparison found."""
    console = new_console(soft_wrap=True)
    heading = Text.assemble(f"{result.bundle}, {result.impl}, {result.dtype}: ", styled(result.verdict))
    console.print(heading)
    inputs, taps = counted(len(result.inputs), "integer input"), counted(result.compared, "tap")
    console.print(f"{inputs} and {taps} compared, {len(result.missing)} missing")
    if result.worst:
        console.print(f"worst: {result.worst.tap.name}, error {error_of(result.worst.difference)}")
    if said := estimates(tap.difference for tap in result.taps):
        console.print(said)
    if result.floor_median is not None and result.alarm is not None:
        median = significant(result.floor_median, 2)
        threshold = significant(result.alarm.threshold, 2)
        console.print(f"median error: {median} times the floor; a tap alarms from at most {threshold} times its own")
    if result.upstream_median is not None:
        console.print(f"median error: {significant(result.upstream_median, 2)} of upstream's own rounding error")
    if result.verdict != AGREE:
        console.print(first_line(result), style="bold")
    if result.remark:
        console.print(result.remark)
    first = result.first_divergence and next(
        r for r in [*result.inputs, *result.taps] if r.tap.name == result.first_divergence["tap"]
    )
    if first:
        d = first.difference
        # The sentence above may tell what is allowed from one tap to the next.
        whole = " of a run from its beginning" if first.limit.allowed else ""
        console.print(f"{first.tap.name}: error {error_of(d)}, limit {significant(first.limit.allowed)}{whole}")
        if d.mismatch:
            console.print(d.mismatch)
        elif d.at is not None:
            console.print(f"largest difference at {list(d.at)}: {d.got:.7g}, the oracle has {d.expected:.7g}")


def new_table(*headings: str) -> Table:
    """Return an empty table."""
    table = Table(show_edge=False, pad_edge=False)
    for heading in headings:
        right = heading in ("taps", "error", "tokens", "arrays equal", "build time")
        table.add_column(heading, justify="right" if right else "left", overflow="fold", no_wrap=heading == "error")
    return table


def print_table(table: Table) -> None:
    """Print a table; where the output is no terminal its lines are not cut to a terminal's width."""
    console = new_console()
    if not console.is_terminal:
        console = new_console(width=200)
    console.print(table)


def styled(verdict: str, message: str = "") -> Text:
    """Return a verdict with its sign in its colour, and a message below it."""
    text = Text(f"{SYMBOLS[verdict]} {verdict}", style=STYLES[verdict])
    return Text.assemble(text, f"\n{message}") if message else text
