"""What lance-parity shows of a localization in the terminal."""

from rich.console import Console
from rich.text import Text

from parity.comparison.verdict import AGREE
from parity.localize.attribution import Attribution
from parity.localize.findings import Finding, Localization
from parity.model import definition
from parity.report.run_page import significant
from parity.report.terminal import new_console, new_table, print_table, styled
from parity.report.words import counted, failures, false_alarms, percent, sentence

# Explanations and other taps of the same cause that are listed of each finding.
EXPLANATIONS, OTHERS = 3, 3


def print_localization(found: Localization) -> None:
    """Print the verdict, then every finding in order."""
    console = new_console(soft_wrap=True)
    heading = f"{found.bundle}, {found.impl}, {found.dtype}: "
    console.print(Text.assemble(heading, styled(found.verdict)))
    console.print(sentence(found), style="bold" if found.verdict != AGREE else "", markup=False)
    console.print(counted(found), markup=False)
    console.print(false_alarms(found), markup=False)
    if found.remark:
        console.print(found.remark, markup=False)
    if found.faults:
        console.print(f"broken on purpose: {', '.join(found.faults)}", markup=False)
    for number, finding in enumerate(found.findings, 1):
        _print_finding(console, number, finding)
    if found.attribution is not None:
        _print_attribution(console, found.attribution)
    if found.seconds is not None and found.peak_bytes is not None:
        console.print(f"{found.seconds:.1f} s, peak memory {found.peak_bytes / 2**20:.0f} MiB")


def _print_finding(console: Console, number: int, finding: Finding) -> None:
    console.print(Text(f"{number}. {finding.component}", style="bold red"))
    local, floor = significant(finding.local_error), significant(finding.floor, 2)
    limit = f", limit {significant(finding.allowed, 2)}" if finding.allowed else ""
    level = f"local error {local}, floor {floor}{limit}" if finding.floor else f"error {local}; it must be equal"
    lines = [f"tap {finding.tap}: {level}", finding.detail]
    if finding.slice:
        lines.append(f"where: {finding.slice}")
    if finding.support:
        lines.append(f"holds: {finding.support}")
    if finding.also:
        more = f" and {len(finding.also) - OTHERS} more" if len(finding.also) > OTHERS else ""
        lines.append(f"same cause: {', '.join(finding.also[:OTHERS])}{more}")
    sign = ("why" if finding.certain else "hint") if finding.explained else "tried"
    equal = len(finding.causes) if finding.explained else 0
    lines += [
        f"{'tried' if i >= max(equal, 1) else 'or' if i else sign}: {e.name} (removes {e.residual_removed:.1%}"
        + (f", {e.second:.1%} on a second input)" if e.second is not None else ")")
        for i, e in enumerate(finding.explanations[:EXPLANATIONS])
    ]
    if not finding.explained:
        lines.append("no hypothesis explains it")
    if finding.record:
        lines.append(f"such explanations were right in {finding.record.right} of {finding.record.told} blind trials")
    lines.append(failures(finding))
    for line in lines:
        if line:
            console.print(f"   {line}", markup=False)


def _print_attribution(console: Console, found: Attribution) -> None:
    how = f"{found.orders} orders" if found.orders else "every subset"
    console.print(f"what the error of the result is owed to ({how}): {found.sentence()}", markup=False)
    results = list(found.left)
    table = new_table("finding", *(f"part of {name}" for name in results), *(f"{name}, alone" for name in results))
    for worth in found.worths:
        shares = [percent(worth.share[name] / found.before[name]) if found.before[name] else "–" for name in results]
        alone = [significant(worth.alone[name]) for name in results]
        table.add_row(f"{', '.join(map(str, worth.numbers))}. {worth.cause}", *shares, *alone)
    print_table(table)


def print_faults() -> None:
    """Print the catalogue and the profiles."""
    table = new_table("fault", "component", "what it does", "tasks", "numerics")
    for fault in definition().CATALOGUE.values():
        table.add_row(fault.name, fault.component, fault.about, " ".join(sorted(fault.tasks)), " ".join(fault.dtypes))
    print_table(table)
    for profile in definition().PROFILES.values():
        names = ", ".join(fault.name for group in profile.departures.values() for fault in group)
        print(f"profile {profile.name}: {profile.about} {names}")
