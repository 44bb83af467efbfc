"""The table of the public port's departures says where one of them is not named."""

from types import SimpleNamespace

import pytest
from peer_table import departures

from parity.localize.findings import EXACT, Explanation, Finding


@pytest.mark.parametrize(("name", "removes", "named"), [("guidance acts at every step", 1.0, True),
                                                        ("guidance acts at every step", 0.94, False),
                                                        ("guidance acts at no step", 1.0, False)])  # fmt: skip
def test_a_departure_is_named_where_its_cause_removes_enough(name, removes, named):
    finding = Finding("guidance", "inputs/guided", "inputs", EXACT, 1.0, 0.0, explanations=[Explanation(name, removes)])
    told = SimpleNamespace(findings=[finding], remark="2 of 4 timesteps are off")
    rows = {row[0]: row for row in departures({"t2i, 3 steps": told})}
    assert rows["guidance acts at every step"][4] is named
    assert rows["times are off in the last bit"][2:] == ("–", "–", False)


def test_what_is_said_in_place_of_findings_counts():
    for said, named in (("ValueError: xocialize/lance-mlx has no i2v (x.py:66)", True), ("TypeError: i2v", False)):
        assert [row[4] for row in departures({"i2v-fp32-kv": said})] == [named]
