"""The tables of the commands that list, verify and compare."""

from collections.abc import Sequence

from rich.text import Text

from parity.bundle.store import DAMAGED, INTACT, Stored, sizes
from parity.comparison.compare import Comparison, TapComparison
from parity.comparison.verdict import AGREE, DIVERGE
from parity.oracle.verify import FAILS, SOUND, UNUSABLE, Verified
from parity.report.run_page import error_of, estimates, significant
from parity.report.terminal import new_console, new_table, print_table

SHOWN = 20
"""Lines of one result that are shown at most."""
_SIGNS = {
    **{SOUND: ("✓", "green"), FAILS: ("✗", "bold red"), UNUSABLE: ("!", "bold yellow")},
    **{AGREE: ("✓", "green"), DIVERGE: ("✗", "bold red")},
}
_STATES = {INTACT: "green", DAMAGED: "bold red"}


def print_bundles(bundles: Sequence[Stored]) -> None:
    """Print the table of `lance-parity oracles`."""
    table = new_table("bundle", "task", "dtype", "entry", "taps", "size", "source", "checkpoint", "checksums", "floors")
    for column in (4, 5):
        table.columns[column].justify = "right"
    for b in bundles:
        checksums = Text(b.checksums, style=_STATES.get(b.checksums, "dim"))
        table.add_row(
            _with(b.path.name, b.problem),
            *(b.task, b.dtype, b.entry, str(b.taps) if b.task else "", sizes(b.size), b.source, b.checkpoint),
            checksums if b.task else "",
            "yes" if b.floors else "no" if b.task else "",
        )
    print_table(table)


def print_verified(results: Sequence[Verified]) -> None:
    """Print the table of `lance-parity verify`, and below it what is wrong."""
    table = new_table("", "files", "tensors", "derived", "verdict")
    for column in (1, 2, 3):
        table.columns[column].justify = "right"
    for result in results:
        counts = (str(count) if count else "–" for count in (result.files, result.tensors, result.derived))
        table.add_row(result.name, *counts, _signed(result.verdict))
    print_table(table)
    console = new_console(soft_wrap=True)
    for result in results:
        for problem in result.problems[:SHOWN]:
            console.print(Text(f"{result.name}: {problem.place}: {problem.what}"))
        if len(result.problems) > SHOWN:
            console.print(Text(f"{result.name}: and {len(result.problems) - SHOWN} more"))
        if result.unjudged:
            console.print(Text(f"{result.name}: not held against the reference: {result.unjudged}"))


def print_comparison(compared: Comparison) -> None:
    """Print what `lance-parity compare` found: the verdict, the first divergence, and the farthest taps."""
    console = new_console(soft_wrap=True)
    for label, run in (("a", compared.a), ("b", compared.b)):
        console.print(Text(f"{label}: {run}"))
    console.print(Text.assemble(_signed(compared.verdict), f", {compared.reason}"))
    console.print(Text("\n".join(compared.describe().splitlines()[1:])), end="\n" if compared.first_divergence else "")
    if said := estimates(tap.difference for tap in compared.taps):
        console.print(Text(said))
    diverging = [tap for tap in compared.taps if tap.diverges]
    apart = sorted((tap for tap in compared.taps if tap.difference.rel_l2), key=_error, reverse=True)
    chosen = diverging or apart
    if not chosen:
        return
    kind = "diverging, in order of execution" if diverging else "farthest"
    more = f" of {len(chosen)}" if len(chosen) > SHOWN // 2 else ""
    console.print(Text(f"{min(len(chosen), SHOWN // 2)}{more} {kind}:"))
    table = new_table("tap", "shape", "dtype", "error", "limit", "largest", "equal bits")
    for tap in chosen[: SHOWN // 2]:
        d = tap.difference
        equal = "–" if d.bits_equal is None else f"{d.bits_equal:.1%}"
        limit = "–" if tap.limit is None else significant(tap.limit)
        shape = "x".join(map(str, tap.shape))
        dtype = tap.dtype if tap.dtype == tap.dtype_b else f"{tap.dtype}, {tap.dtype_b}"
        table.add_row(tap.name, shape, dtype, error_of(d), limit, significant(d.max_abs), equal)
    print_table(table)


def _error(tap: TapComparison) -> float:
    return tap.difference.rel_l2


def _signed(verdict: str) -> Text:
    sign, style = _SIGNS.get(verdict, ("?", "bold yellow"))
    return Text(f"{sign} {verdict}", style=style)


def _with(name: str, problem: str | None) -> Text:
    return Text.assemble(name, (f"\n{problem}", "bold yellow")) if problem else Text(name)
