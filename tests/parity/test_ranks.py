"""lance_mlx by several processes, judged as any port is: by what all of them have whole."""

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from parity.cli.main import app
from parity.comparison.check import check_bundle
from parity.errors import ParityError
from parity.model import definition

pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this MLX has no ring backend")

WRONG = """
import mlx.core as mx
from lance_mlx.distributed.split import RowsSplit

def gather(self, x, count, right=RowsSplit.gather):
    rows = right(self, x, count)
    return rows if x.ndim == 3 else mx.concatenate([rows[:1], rows[:-1]])

RowsSplit.gather = gather
"""
"""The last latent's keys and values are lost, and the first one's there twice."""


def test_processes_that_share_rows_agree(oracles):
    result = check_bundle(oracles / "t2i-fp32-nokv", definition().ranks_port(2, "rows"))
    assert (result.verdict, result.impl) == ("agree", "mlx, 2 ranks, rows")
    told = {each.tap.name for each in result.taps}
    assert {"sampler.x_t3", "latent", "pixels"} <= told and "velocity_call0" in result.missing


@pytest.mark.exhaustive
def test_processes_that_gather_wrongly_do_not(oracles, tmp_path, monkeypatch):
    # Python imports this when the processes begin.
    (tmp_path / "sitecustomize.py").write_text(WRONG)
    monkeypatch.syspath_prepend(tmp_path)
    result = check_bundle(oracles / "t2i-fp32-nokv", definition().ranks_port(2, "rows"))
    assert (result.verdict, result.first_divergence["tap"]) == ("diverge", "sampler.x_t1")


@pytest.mark.exhaustive
def test_processes_that_fail_or_go_apart_are_told_in_one_line(oracles, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(WRONG.replace("return rows", "return rows + self.ranks.rank"))
    with pytest.raises(ParityError, match="ranks 0 and 1 differ at "):
        check_bundle(oracles / "t2i-fp32-nokv", definition().ranks_port(2, "rows"))
    (tmp_path / "sitecustomize.py").write_text(
        "import os, lance_mlx.distributed.split as split\n"
        "def end(self, *_):\n    if self.ranks.rank: os._exit(9)\n    self.ranks.gather(split.mx.zeros(1))\n"
        "split.ArmsSplit.__call__ = end\n"
    )
    with pytest.raises(ParityError, match="rank 1 failed"):
        check_bundle(oracles / "t2i-fp32-nokv", definition().ranks_port(2, "guidance"))


@pytest.mark.parametrize(
    ("bundle", "count", "split", "words"),
    [
        ("x2t_image-fp32-nokv", 2, "rows", "which one process makes"),
        ("t2i-fp32-nokv", 1, "rows", "from 2 to 16"),
        ("t2i-fp32-nokv", 3, "guidance", "give --ranks 2"),
    ],
)
def test_what_no_processes_can_share_is_refused(oracles, bundle, count, split, words):
    with pytest.raises(ParityError, match=words):
        check_bundle(oracles / bundle, definition().ranks_port(count, split))


def test_ranks_are_of_lance_mlx(oracles):
    bundle = str(oracles / "t2i-fp32-nokv")
    refused = CliRunner().invoke(app, ["check", bundle, "--impl", "reference", "--ranks", "2"])
    assert refused.exit_code == 2 and "give --impl mlx, not reference" in refused.stderr
    refused = CliRunner().invoke(app, ["check", bundle, "--ranks", "1"])
    assert refused.exit_code == 2 and "from 2 to 16" in refused.stderr
