"""The HTML report of a run: a table of all comparisons and a page for each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from parity.comparison.check import Result
from parity.comparison.verdict import AGREE, DIVERGE, INCONCLUSIVE, MEDIAN, UNUSABLE
from parity.ports.provenance import origin
from parity.report.drawing import source
from parity.report.output import new_folder
from parity.report.plots import error_plot
from parity.tensors.metrics import Difference
from parity.tensors.sketch import CONFIDENCE

UNSUPPORTED = "unsupported"
SYMBOLS = {AGREE: "✓", DIVERGE: "✗", INCONCLUSIVE: "?", UNUSABLE: "!", UNSUPPORTED: "–"}

MEASURED = (
    "How far a tap may be is measured for each bundle: its floor is how far equally right variants of the reference "
    "are from the one that rounds least, and its limit is what two such runs may be apart, so that one right run in a "
    f"hundred alarms, all taps together. The median tap may be {MEDIAN:.3g} floors off. Before that the reference "
    "itself is held against the oracle: where they disagree nothing is said of a port."
)
POLICIES = {
    "float32": "Everything in float32.",
    "bfloat16": "As upstream's launcher runs it: bfloat16 weights, activations and states, RoPE frequencies rounded to "
    "bfloat16, norms in float32.",
}


@dataclass(frozen=True)
class Row:
    """A line of the table: a comparison, or why there is none; `page` is the name of its page."""

    bundle: str
    impl: str
    verdict: str
    dtype: str = ""
    result: Result | None = None
    message: str = ""
    page: str = ""

    @property
    def symbol(self) -> str:
        """A sign for the verdict, beside its colour."""
        return SYMBOLS[self.verdict]


def row_of(result: Result, taken: set[str]) -> Row:
    """Return the row of a result, with a page name that is not yet in `taken`, and take that name."""
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in f"{result.bundle}-{result.impl}")
    names = (f"{stem}.html" if number == 1 else f"{stem}-{number}.html" for number in range(1, len(taken) + 2))
    page = next(name for name in names if name not in taken)
    taken.add(page)
    return Row(result.bundle, result.impl, result.verdict, result.dtype, result, first_line(result), page)


def first_line(result: Result) -> str:
    """Return in words where a result diverges or what it lacks; empty when it agrees."""
    if result.verdict == INCONCLUSIVE:
        return result.reason
    if result.first_divergence:
        return f"first divergence: {result.first_divergence['component']} in {result.first_divergence['call']}"
    if result.missing:
        return f"missing: {result.missing[0]}" + (f" and {more} more" if (more := len(result.missing) - 1) else "")
    return "" if result.verdict == AGREE else "nothing was compared"


def write_report(folder: Path, rows: Sequence[Row], sources: Sequence[str]) -> Path:
    """Write the pages into `folder`, whole or not at all; return the index page. See new_folder; raises ParityError.

    `sources` are the folders that were named on the command line.
    """
    environment = page_environment()
    created = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in SYMBOLS}
    page = environment.get_template("index.html")
    with new_folder(folder) as beside:
        rules = {"policies": POLICIES, "measured": MEASURED}
        html = page.render(rows=rows, counts=counts, created=created, sources=sources, **rules)
        (beside / "index.html").write_text(html, encoding="utf-8")
        for row in rows:
            if row.result is not None:
                (beside / row.page).write_text(_comparison(environment, row, created), encoding="utf-8")
    return folder / "index.html"


def page_environment() -> Environment:
    """Return the templates with the filters that they use; all that they are given is escaped."""
    environment = Environment(
        loader=PackageLoader("parity.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "sig": significant,
        "source": source,
        "error": error_of,
        "mib": lambda n: "unknown" if n is None else f"{n / 2**20:.0f} MiB",
    }
    return environment


def significant(value: float | None, digits: int = 3) -> str:
    """Return a number with a few significant digits, or a dash where there is none."""
    return "–" if value is None else "0" if value == 0 else f"{value:.{digits}g}"


def counted(count: int, what: str) -> str:
    """A number of things in words."""
    return f"{count} {what}{'s' * (count != 1)}"


def error_of(difference: Difference) -> str:
    """Return a relative error with three digits, behind ≈ where sketches tell it; NaN beside values that are not
    finite."""
    if difference.odd:
        return "NaN"
    return f"{'≈' if difference.accuracy else ''}{significant(difference.rel_l2)}"


def estimates(differences: Iterable[Difference]) -> str | None:
    """Say in a sentence how many errors are estimates, and how near they are; None where all are exact."""
    found = [difference.accuracy for difference in differences if difference.accuracy]
    if not found:
        return None
    near = f"{max(found):.1%} of the exact error in {CONFIDENCE:.0%} of all cases"
    return f"{len(found)} errors (≈) are estimated from sketches: each is within {near}"


def _comparison(environment: Environment, row: Row, created: str) -> str:
    result = row.result
    return environment.get_template("comparison.html").render(
        row=row,
        result=result,
        origin=origin(result.source),
        created=created,
        plot=error_plot(result),
        policy=POLICIES[result.dtype],
    )
