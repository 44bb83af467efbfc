"""The public MLX port and its imitation, lance_mlx broken as it departs from upstream: both get the same findings.

LANCE_PEER names a clone of it, LANCE_PEER_PYTHON a Python with its packages; see examples/README.md.
"""

import os
from pathlib import Path

import pytest

from parity.bundle.reading import read_bundle
from parity.lance.faults import PROFILES
from parity.localize.investigation import localize
from parity.ports.loading import port_loader

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "oracles"
CLONE, PYTHON = os.environ.get("LANCE_PEER"), os.environ.get("LANCE_PEER_PYTHON")


def told(found):
    """What is wrong, by its cause."""
    return {f.explanations[0].name if f.explained else "": f.component for f in found.findings}


@pytest.mark.skipif(not (CLONE and PYTHON), reason="LANCE_PEER and LANCE_PEER_PYTHON name no clone and no Python")
@pytest.mark.parametrize("name", ["t2i-fp32-kv", "t2v-fp32-kv"])
def test_the_imitation_gets_what_the_port_gets(name):
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"{path} is not there; the checkpoint of the embedded bundles has no table of places")
    load = port_loader(f"{ROOT / 'examples/xocialize_lance_mlx.py'}:Port", Path(PYTHON))
    real = told(localize(path, load))
    imitated = told(localize(path, faults=PROFILES["xocialize-lance-mlx"].faults_of(read_bundle(path))))
    assert imitated.keys() == real.keys()
    # The port tells fewer parts of a component than lance_mlx does.
    assert all(f"{imitated[cause]}.".startswith(f"{real[cause]}.") for cause in real)
