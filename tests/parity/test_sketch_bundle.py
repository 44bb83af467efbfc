"""Bundles that hold sketches: recorded, checked, compared, verified and localized as whole ones are."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fault_trials import try_fault
from typer.testing import CliRunner

from parity.bundle.reading import read_bundle
from parity.bundle.store import seal
from parity.cli.main import app
from parity.comparison.check import check_bundle, replayed
from parity.comparison.compare import compare_runs
from parity.errors import ParityError
from parity.lance.faults import CATALOGUE
from parity.lance.ports import MlxPort
from parity.lance.record import record
from parity.lance.record_options import Options, build_request
from parity.oracle.floors import measure
from parity.oracle.floors_file import FILE as FLOORS
from parity.oracle.floors_file import floors_of, write_floors
from parity.oracle.judgement import judge
from parity.oracle.oracle import Oracle
from parity.oracle.verify import verify_bundle
from parity.tensors.metrics import compare
from parity.tensors.recording import read_tensors, write_tensors
from parity.tensors.sketch import ACCURACY, LARGEST, Sketch
from parity.tensors.sketch_file import FILE

ORACLES = Path(__file__).parents[2] / "oracles"
STREAM = "cond.step0/language_model.model.layers.1"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, alone):
    """The same request whole, as sketches, and as sketches with the residual stream whole."""
    folder = tmp_path_factory.mktemp("levels")
    values = {"prompt": "a bird", "width": 96, "height": 96, "steps": 1}
    request = build_request("t2i", Options(**values))
    made = {}
    for name, more in (
        ("whole", {}),
        ("sketch", {"level": "sketch"}),
        ("stream", {"level": "sketch", "whole": ("layers.?", "*/hidden_in")}),
    ):
        made[name] = record(folder / name, ORACLES / "checkpoint-a", request, dtype="float32", **more)
    oracle = Oracle.of(read_bundle(made["sketch"]))
    with alone():
        write_floors(made["sketch"] / FLOORS, oracle, measure(oracle))
    return made


def test_a_bundle_of_sketches_holds_at_most_16_kb_a_tap(bundles):
    whole, sketched, stream = (read_bundle(path) for path in bundles.values())
    assert sketched.manifest["level"] == "sketch" and "level" not in whole.manifest
    assert sketched.expected.keys() == whole.taps.keys() and sketched.sketches.keys().isdisjoint(sketched.taps)
    assert all(2 * 4 * sketch.sums.size < LARGEST for sketch in sketched.sketches.values())
    assert all(tap.array.nbytes < LARGEST for name, tap in sketched.taps.items() if not name.startswith("sampler."))
    assert {"sampler.noise", "sampler.timestep0", "cond.step0/position_ids"} <= sketched.taps.keys()
    assert STREAM in stream.taps and f"{STREAM}.self_attn.sdpa" in stream.sketches
    assert sketched.sketches[STREAM].groups == ["brackets", "noise"]
    for name, sketch in sketched.sketches.items():
        assert compare(whole.taps[name], sketch).bits_equal == 1.0, name
    sizes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in bundles.values()]
    assert sizes[1] < sizes[2] < sizes[0] / 1.5


def test_an_estimated_check_agrees_with_the_exact_one(bundles):
    whole, estimated = read_bundle(bundles["whole"]), check_bundle(bundles["sketch"], "mlx")
    recording = replayed(MlxPort(whole), whole)
    errors = {name: compare(tap, recording[name]).rel_l2 for name, tap in whole.taps.items()}
    assert estimated.verdict == "agree" and {tap.tap.name for tap in estimated.taps} == errors.keys()
    near = []
    for tap in estimated.taps:
        if tap.difference.accuracy is None:
            assert tap.difference.rel_l2 == errors[tap.tap.name]
        else:
            assert tap.difference.accuracy == ACCURACY
            near.append(abs(tap.difference.rel_l2 / errors[tap.tap.name] - 1) <= 0.1)
    assert len(near) > 50 and np.mean(near) >= 0.95
    document = next(tap.to_json() for tap in estimated.taps if tap.difference.groups)
    assert 0 < document["accuracy"] < 0.1 and all(error >= 0 for error in document["groups"].values())


def test_two_runs_are_compared_by_their_sketches(bundles):
    assert compare_runs(str(bundles["whole"]), str(bundles["sketch"])).verdict == "agree"
    judged = compare_runs(str(bundles["sketch"]), f"{bundles['sketch']}@mlx", within=1e-4)
    assert judged.verdict == "agree"
    assert compare_runs(str(bundles["sketch"]), f"{bundles['sketch']}@mlx", within=1e-8).verdict == "diverge"


def test_what_is_sketched_is_verified(bundles, tmp_path):
    assert verify_bundle(bundles["sketch"]).problems == []
    folder = tmp_path / "levels"
    damaged = Path(shutil.copytree(bundles["sketch"], folder / "sketch"))
    (folder / "checkpoint-a").symlink_to(ORACLES / "checkpoint-a", target_is_directory=True)
    sketches = read_tensors(damaged / FILE)
    del sketches[STREAM]
    write_tensors(damaged / FILE, sketches)
    assert {problem.place for problem in verify_bundle(damaged).problems} == {FILE}
    with pytest.raises(ParityError, match=f"sketch/{FILE} does not match its checksum"):
        read_bundle(damaged)
    seal(damaged)
    with pytest.raises(ParityError, match=f"lack {STREAM}"):
        read_bundle(damaged)
    manifest = json.loads((damaged / "manifest.json").read_text())
    (damaged / "manifest.json").write_text(json.dumps(manifest | {"level": "small"}))
    with pytest.raises(ParityError, match="'small', not one of whole, sketch"):
        read_bundle(damaged)


@pytest.mark.parametrize(
    ("key", "value"),
    [("name", ["a"]), ("shape", None), ("groups", [["noise", 1e400]]), ("groups", 3)],
)
def test_a_sketch_that_is_listed_as_none_is_told(bundles, tmp_path, key, value):
    damaged = Path(shutil.copytree(bundles["sketch"], tmp_path / "sketch"))
    manifest = json.loads((damaged / "manifest.json").read_text())
    entry = next(entry for entry in manifest["taps"] if "groups" in entry)
    entry[key] = value
    if value is None:
        del entry[key]
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    assert {problem.place for problem in verify_bundle(damaged).problems} & {FILE, "manifest.json"}
    with pytest.raises(ParityError, match="bundle sketch"):
        compare_runs(str(damaged), str(bundles["whole"]))


@pytest.mark.parametrize("name", ["key-norm-missing", "weight-quantized", "renorm-channel"])
def test_faults_are_found_and_named_from_sketches(bundles, localized_sketch, name):
    trial = try_fault(CATALOGUE[name], *localized_sketch)
    assert trial.detected and trial.named and trial.explained


@pytest.fixture(scope="module")
def localized_sketch(bundles):
    bundle = read_bundle(bundles["sketch"])
    return bundle, Oracle.of(bundle), MlxPort(bundle)


def test_the_reference_is_held_against_sketches(localized_sketch):
    bundle, oracle, _ = localized_sketch
    assert isinstance(bundle.expected[STREAM], Sketch) and oracle.source(STREAM) == "upstream"
    assert compare(bundle.expected[STREAM], oracle.own[STREAM]).rel_l2 < 1e-12
    floors = floors_of(oracle)
    assert judge(oracle, floors).agree
    # Another sketch in its place is seen.
    other = replace(bundle.expected[STREAM], sums=bundle.expected[STREAM].sums * np.float32(1.01))
    changed = replace(oracle, bundle=replace(bundle, sketches=bundle.sketches | {STREAM: other}))
    assert judge(changed, floors).departures[0].tap.name == STREAM


def test_levels_and_names_that_go_together(bundles, tmp_path):
    command = ["record", "t2i", "--checkpoint", str(ORACLES / "checkpoint-a"), "--prompt", "a bird"]
    command += ["--out", str(tmp_path / "x")]
    for more, told in (
        (["--level", "small"], "level 'small' is not one of whole, sketch"),
        (["--whole", "layers.?"], "leave --whole out"),
    ):
        done = CliRunner().invoke(app, [*command, *more])
        assert done.exit_code == 2 and told in done.stderr and not (tmp_path / "x").exists()
    done = CliRunner().invoke(app, ["check", str(bundles["sketch"]), "--impl", "reference"])
    assert done.exit_code == 0
    done = CliRunner().invoke(app, ["compare", str(bundles["sketch"]), f"{bundles['sketch']}@mlx", "--format", "json"])
    taps = {tap["tap"]: tap for tap in json.loads(done.stdout)["taps"]}
    assert done.exit_code == 0 and taps[STREAM]["accuracy"] == pytest.approx(ACCURACY)
    done = CliRunner().invoke(app, ["compare", str(bundles["sketch"]), f"{bundles['sketch']}@mlx"])
    assert "within 6.1% of the exact error in 95% of all cases" in done.stdout and "≈" in done.stdout
