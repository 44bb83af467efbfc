"""Runs all comparisons of lance-parity and tells how they ended."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from parity.bundle.reading import read_bundle
from parity.comparison.check import UnsupportedTask, check_bundle
from parity.comparison.verdict import AGREE, DIVERGE, INCONCLUSIVE, UNUSABLE
from parity.errors import ParityError
from parity.ports.port import Loader
from parity.report.run_page import UNSUPPORTED, Row, row_of

# The bundles are small: more threads cost more than they bring.
MAX_THREADS = 1


Tell = Callable[[str], None]


def compare_all(
    paths: Sequence[Path],
    loaders: Mapping[str, Loader],
    start: Callable[[str], Tell],
    prepared: Callable[[Path, Tell], AbstractContextManager[Path]] = lambda path, tell: nullcontext(path),
) -> list[Row]:
    """Compare every port with every bundle; what is unusable becomes a row that says why.

    `start` is told the name of each comparison and returns the callback for its progress. `prepared` gives the bundle
    that is compared in the place of one, for as long as its context lasts.
    """
    limit_threads()
    rows, pages = [], {"index.html"}
    for path in paths:
        for name, load in loaders.items():
            progress = start(f"{path.name} {name}")
            try:
                with prepared(path, progress) as bundle:
                    rows.append(row_of(check_bundle(bundle, load, progress), pages))
            except UnsupportedTask as error:
                rows.append(Row(path.name, name, UNSUPPORTED, read_bundle(path).dtype, message=str(error)))
            except ParityError as error:
                rows.append(Row(path.name, name, UNUSABLE, message=str(error)))
    return rows


def exit_status(verdicts: Sequence[str]) -> int:
    """Return 1 if anything diverges, else 2 if anything is unusable or inconclusive or nothing was compared, else 0."""
    if DIVERGE in verdicts:
        return 1
    return 2 if {UNUSABLE, INCONCLUSIVE} & set(verdicts) or AGREE not in verdicts else 0


def limit_threads() -> None:
    """Keep PyTorch to MAX_THREADS."""
    torch.set_num_threads(min(MAX_THREADS, torch.get_num_threads()))
