"""Where the scripts put what they measured: between two comments of a Markdown file."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from parity.errors import ParityError
from parity.files import write_atomically

README = Path(__file__).parents[1] / "reports" / "README.md"


def replace_between(path: Path, name: str, text: str) -> None:
    """Put text between the comments `<!-- NAME: begin -->` and `<!-- NAME: end -->` of a file; raises ParityError."""
    place = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
    before = path.read_text(encoding="utf-8")
    if not place.search(before):
        raise ParityError(f"{path} has no place for the table {name!r}: give another --output")
    write_atomically(path, place.sub(lambda match: match[1] + text + match[2], before).encode())


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"


def upper_bound(events: int, trials: int, confidence: float = 0.95) -> float:
    """The largest rate under which so few events or fewer come with a chance of 1 - confidence (Clopper, Pearson)."""
    from math import comb

    low, high = 0.0, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        chance = sum(comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(events + 1))
        low, high = (rate, high) if chance > 1 - confidence else (low, rate)
    return high
