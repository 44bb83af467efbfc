"""The trials of a fault table by several processes: as they come, and again where a process died at one."""

import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from fault_trials import Rows, Trial, plan, row_of, trial_of, try_fault

from parity.bundle.reading import Bundle, read_bundle
from parity.errors import ParityError
from parity.lance.faults import Fault, load_fault
from parity.lance.ports import MlxPort
from parity.oracle.oracle import Oracle
from parity.report.runner import limit_threads

MOST_TRIES = 3
"""Of a case at which processes die."""


class Case(NamedTuple):
    """A fault, by what it is loaded from, on a bundle, by its folder."""

    fault: str
    bundle: Path


def try_by_workers(
    paths: Sequence[Path],
    faults: Mapping[str, Fault],
    start: Callable[[str], Callable[[str], None]],
    rows: Rows,
    workers: int,
) -> Iterator[Trial]:
    """As fault_trials.try_faults, by so many processes and in the order in which they end.

    Args:
        faults: by what they are loaded from.

    Raises:
        ParityError: processes died at one case again and again.
    """
    specs = {fault.name: spec for spec, fault in faults.items()}
    cases, tells = [], {}
    for bundle, chosen in plan(faults.values(), [read_bundle(path) for path in paths]):
        tells[bundle.path] = start(bundle.name)
        for fault in chosen:
            if (made := rows.of(fault, bundle.name)) is not None:
                yield made
            else:
                cases.append(Case(specs[fault.name], bundle.path))
    for case, row in results_of(cases, _try, workers):
        tells[case.bundle](faults[case.fault].name)
        yield rows.keep(trial_of(row, faults[case.fault]))


def results_of(
    cases: Sequence[Case], work: Callable[[Case], dict[str, Any]], workers: int
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Each case with what `work`, a function of a module, makes of it in another process."""
    waiting, tries = deque(cases), Counter()
    while waiting:
        context, running = multiprocessing.get_context("spawn"), {}
        with ProcessPoolExecutor(workers, context, limit_threads) as pool:
            try:
                yield from _worked(pool, waiting, running, work, workers)
            except BrokenProcessPool:
                # Which of them its process died at is not told.
                for case in reversed(running.values()):
                    tries[case] += 1
                    if tries[case] == MOST_TRIES:
                        raise ParityError(
                            f"{case.fault} on {case.bundle.name}: {MOST_TRIES} processes died; give fewer --workers"
                        ) from None
                    waiting.appendleft(case)


def _worked(
    pool: ProcessPoolExecutor,
    waiting: deque[Case],
    running: dict[Future, Case],
    work: Callable[[Case], dict[str, Any]],
    workers: int,
) -> Iterator[tuple[Case, dict[str, Any]]]:
    while waiting or running:
        # No more than are at work, so that few are tried again.
        while waiting and len(running) < workers:
            running[pool.submit(work, waiting[0])] = waiting[0]
            waiting.popleft()
        for done in wait(running, return_when=FIRST_COMPLETED).done:
            row = done.result()
            yield running.pop(done), row


@lru_cache(maxsize=1)
def _loaded(path: Path) -> tuple[Bundle, Oracle, MlxPort]:
    bundle = read_bundle(path)
    return bundle, Oracle.of(bundle), MlxPort(bundle)


def _try(case: Case) -> dict[str, Any]:
    return row_of(try_fault(load_fault(case.fault), *_loaded(case.bundle)))
