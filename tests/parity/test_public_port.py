"""What is said of the public MLX port; its imitation, lance_mlx broken as it departs from upstream, gets the same.

LANCE_PEER names a clone of it, LANCE_PEER_PYTHON a Python with its packages; see examples/README.md.
"""

import os
from pathlib import Path

import pytest

from parity.bundle.reading import read_bundle
from parity.errors import ParityError
from parity.lance.faults import PROFILES
from parity.lance.hypotheses import HYPOTHESES
from parity.lance.record import record
from parity.lance.record_options import Options, build_request
from parity.localize.investigation import localize
from parity.ports.loading import port_loader

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "oracles"
CLONE, PYTHON = os.environ.get("LANCE_PEER"), os.environ.get("LANCE_PEER_PYTHON")


def told(found):
    """What is wrong, by its cause."""
    return {f.explanations[0].name if f.explained else "": f.component for f in found.findings}


pytestmark = [
    pytest.mark.skipif(not (CLONE and PYTHON), reason="LANCE_PEER and LANCE_PEER_PYTHON name no clone and no Python"),
    pytest.mark.skipif(
        not SHARED.is_dir(), reason=f"{SHARED} is not there; that of the embedded bundles has no table of places"
    ),
]


@pytest.fixture
def load():
    return port_loader(f"{ROOT / 'examples/xocialize_lance_mlx.py'}:Port", Path(PYTHON))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Three steps, of which the last is not guided."""
    options = Options(prompt="a red bird", width=64, height=48, steps=3, timestep_shift=1.0)
    path, checkpoint = tmp_path_factory.mktemp("recorded") / "short", SHARED / "checkpoint-a"
    return record(path, checkpoint, build_request("t2i", options), dtype="float32")


@pytest.mark.parametrize(
    ("task", "causes"),
    [
        ("x2t_image", {"no key after the query is seen"}),
        ("x2t_video", {"no key after the query is seen", "the temporal stride is 1"}),
    ],
)
def test_what_the_port_does_with_questions_is_named(load, task, causes):
    assert told(localize(SHARED / f"{task}-fp32-kv", load)).keys() == causes


def test_guidance_at_every_step_is_named_and_the_last_bit_of_times_is_no_finding(load, short):
    found = localize(short, load)
    assert told(found)["guidance acts at every step"] == "guidance"
    assert "" not in told(found) and "schedule" not in told(found).values()
    assert "1 of 4 timesteps are off by up to 3e-08, as rounding makes them" in found.remark


def test_quantized_it_casts_the_noise_to_whole_numbers(load, short, monkeypatch):
    monkeypatch.setenv("LANCE_PEER_BITS", "8")
    about = [hypothesis for hypothesis in HYPOTHESES if hypothesis.about("noise")]
    assert (
        told(localize(short, load, hypotheses=about))["the noise is cast to an unsigned integer, which wraps"]
        == "noise"
    )


def test_what_it_has_not_is_said_in_a_line(load):
    with pytest.raises(ParityError, match="xocialize/lance-mlx has no i2v"):
        localize(SHARED / "i2v-fp32-kv", load)


@pytest.mark.parametrize("name", ["t2i-fp32-kv", "t2v-fp32-kv"])
def test_the_imitation_gets_what_the_port_gets(load, name):
    path = SHARED / name
    real = told(localize(path, load))
    imitated = told(localize(path, faults=PROFILES["xocialize-lance-mlx"].faults_of(read_bundle(path))))
    assert imitated.keys() == real.keys()
    # The port tells fewer parts of a component than lance_mlx does.
    assert all(f"{imitated[cause]}.".startswith(f"{real[cause]}.") for cause in real)
