"""What lance-parity shows of a streamed comparison in the terminal."""

from rich.text import Text

from parity.comparison.verdict import AGREE, DIVERGE
from parity.lance.stream.comparison import Streamed
from parity.report.terminal import new_console, new_table, print_table, styled
from parity.report.words import counted, false_alarms, number, times


def print_streamed(found: Streamed) -> None:
    """Print a row for every part, then the verdict and what is wrong first."""
    table = new_table("part", "farthest tap by itself", "local error", "× floor", "allowed", "total error", "verdict")
    for column in table.columns[2:6]:
        column.justify = "right"
    for part in found.parts:
        far = part.farthest
        table.add_row(
            part.name,
            far.tap.name if far else "",
            number(far and far.local),
            times(far and far.ratio),
            number(far and far.allowed),
            number(part.total),
            styled(DIVERGE if part.wrong else AGREE),
        )
    print_table(table)
    console = new_console(soft_wrap=True)
    console.print(Text.assemble(f"{found.bundle}, {found.impl}, {found.dtype}: ", styled(found.verdict)))
    for finding in found.findings[:1]:
        over = f", {times(finding.local_error / finding.floor)} times its floor" if finding.floor else ""
        console.print(
            f"wrong first: {finding.component}, at {finding.tap}: local error {number(finding.local_error)}{over}",
            style="bold red",
            markup=False,
        )
        console.print(finding.detail, markup=False)
        rest = [other.component for other in found.findings[1:]]
        if rest:
            console.print(f"wrong by itself too: {', '.join(dict.fromkeys(rest))}", markup=False)
    if found.reason:
        console.print(found.reason, markup=False)
    if found.remark:
        console.print(found.remark, markup=False)
    console.print(counted(found), markup=False)
    console.print(false_alarms(found), markup=False)
    if found.faults:
        console.print(f"broken on purpose: {', '.join(found.faults)}", markup=False)
    if found.seconds is not None and found.peak_bytes is not None:
        console.print(f"{found.seconds:.1f} s, peak memory {found.peak_bytes / 2**30:.2f} GB")
