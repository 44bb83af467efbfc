"""The table of faults by several processes: the same as alone, also where one of them dies."""

from pathlib import Path

import fault_table
import pytest
import typer
from fault_workers import MOST_TRIES, Case, results_of
from typer.testing import CliRunner

from parity.errors import ParityError

DIES = """
import os
from pathlib import Path

def work(case):
    tries = Path(__file__).with_name(case.fault)
    with tries.open("a") as file:
        file.write("x")
    if case.fault == "always" or case.fault == "once" and len(tries.read_text()) == 1:
        os._exit(9)
    return {"fault": case.fault}
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Work at which processes die, in a module that they can import."""
    (tmp_path / "dies.py").write_text(DIES)
    monkeypatch.syspath_prepend(tmp_path)
    import dies

    yield dies.work
    del __import__("sys").modules["dies"]


def cases(*names: str) -> list[Case]:
    return [Case(name, Path("bundle")) for name in names]


def test_what_a_process_died_at_is_tried_again(work, tmp_path):
    asked = cases("one", "once", "two", "three")
    found = list(results_of(asked, work, 2))
    assert sorted(found) == sorted((case, {"fault": case.fault}) for case in asked)
    assert (tmp_path / "once").read_text() == "xx"


@pytest.mark.exhaustive
def test_what_processes_always_die_at_is_named(work, tmp_path):
    with pytest.raises(ParityError, match=f"always on bundle: {MOST_TRIES} processes died"):
        list(results_of(cases("always"), work, 2))
    assert (tmp_path / "always").read_text() == "x" * MOST_TRIES


@pytest.mark.exhaustive
def test_the_table_by_two_processes_is_the_one_by_one(oracles):
    app = typer.Typer()
    app.command()(fault_table.main)
    given = [str(oracles / "t2i-fp32-nokv"), "--fault", "schedule-shift-1", "--fault", "renorm-channel"]
    alone, together = (CliRunner().invoke(app, [*given, *more]) for more in ([], ["--workers", "2"]))
    assert alone.exit_code == together.exit_code == 0, together.stderr
    assert alone.stdout == together.stdout and alone.stdout.count("| t2i-fp32-nokv |") == 2
