import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from parity.cli.main import app
from parity.errors import ParityError
from parity.lance.ports import PORTS


@pytest.fixture
def use(monkeypatch):
    """Put implementations in the place of mlx and the reference."""

    def replace(**implementations):
        for name, implementation in implementations.items():
            monkeypatch.setitem(PORTS, name, implementation)

    return replace


@pytest.fixture
def lance_parity(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return invoke


@pytest.mark.parametrize("module", ["parity.cli.main", "lance_mlx.cli.main"])
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_output_that_nobody_reads_ends_quietly_as_cat_does(module, option):
    code = f"import {module} as command; command.main()"
    command = [sys.executable, "-c", code, option]
    read, write = os.pipe()
    os.close(read)
    try:
        unread = subprocess.run(command, stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert (unread.returncode, unread.stderr) == (141, b"")
    assert subprocess.run(command, stdout=subprocess.PIPE).returncode == 0


def doubled(array):
    return array * 2


def one_line(result, *words):
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("lance-parity: "), result.stderr
    for word in words:
        assert word in result.stderr


def interrupted(bundle):
    raise KeyboardInterrupt


def failing(bundle):
    raise ParityError("mlx cannot run it: why")


def test_check_exits_0_and_writes_json_and_dump(lance_parity, use, bundle, replayed, tmp_path):
    use(mlx=replayed())
    result = lance_parity("check", bundle, "--impl", "mlx", "--json", "out/r.json", "--dump", "dump")
    assert result.exit_code == 0 and "agree" in result.stdout and result.stderr == ""
    document = json.loads((tmp_path / "out" / "r.json").read_text(encoding="utf-8"))
    keys = ["bundle", "impl", "verdict", "compared", "missing", "worst", "first_divergence"]
    assert [document[key] for key in keys] == [
        bundle.name,
        "mlx",
        "agree",
        20,
        [],
        {"tap": document["worst"]["tap"], "rel_l2": 0},
        None,
    ]
    assert {"tap", "rel_l2", "max_abs"} <= set(document["taps"][0])
    stored = [safe_open(path / "taps.safetensors", "np") for path in (tmp_path / "dump", bundle)]
    # The integers of the sequence lie beside the taps.
    assert {name for name in stored[0].keys() if not name.startswith("inputs/")} == set(stored[1].keys())
    assert "inputs/text_ids" in stored[0].keys()
    for name in stored[1].keys():
        assert np.array_equal(*(file.get_tensor(name) for file in stored))


def test_dump_keeps_names_shapes_and_dtypes(lance_parity, use, copy_bundle, replayed, tmp_path):
    use(mlx=replayed())
    bundle = copy_bundle("t2v-bf16-kv")
    assert lance_parity("check", bundle, "--impl", "mlx", "--dump", tmp_path).exit_code == 0
    with safe_open(tmp_path / "taps.safetensors", "np") as ours, safe_open(bundle / "taps.safetensors", "np") as oracle:
        described = [
            {
                name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape())
                for name in file.keys()
                if not name.startswith("inputs/")
            }
            for file in (ours, oracle)
        ]
    assert described[0] == described[1]
    assert {dtype for dtype, _ in described[0].values()} == {"BF16", "F32", "I32"}


def test_check_exits_1_and_names_the_component(lance_parity, use, detailed_bundle, replayed):
    tap = "cond.step0/language_model.model.layers.1.self_attn.q_norm_moe_gen"
    use(reference=replayed(name="reference", changed={tap: doubled}))
    result = lance_parity("check", detailed_bundle, "--impl", "reference", "--json", "r.json", "--dump", "dump")
    assert result.exit_code == 1
    assert "first divergence: layers.1.self_attn.q_norm_moe_gen in cond.step0" in result.stdout


def test_check_exits_2_where_taps_are_missing(lance_parity, use, bundle, replayed):
    use(mlx=replayed(dropped=("pixels",)))
    result = lance_parity("check", bundle, "--impl", "mlx")
    assert result.exit_code == 2 and "missing: pixels" in result.stdout


def test_check_exits_2_and_says_why_where_nothing_can_be_said(lance_parity, use, bundle, unsteady, tmp_path):
    use(mlx=unsteady("velocity_call1"))
    result = lance_parity("check", bundle, "--impl", "mlx", "--json", "r.json")
    assert result.exit_code == 2 and result.stderr == ""
    assert "? inconclusive" in result.stdout and "two equal runs differ first at velocity_call1" in result.stdout
    document = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert document["verdict"] == "inconclusive" and document["first_divergence"] is None
    assert document["reason"] == "two equal runs differ first at velocity_call1"


def test_check_exits_2_where_the_reference_cannot_run(lance_parity, use, copy_bundle, replayed):
    use(mlx=replayed())
    result = lance_parity("check", copy_bundle("t2i-fp32-nokv", weights=False), "--impl", "mlx")
    assert result.exit_code == 2 and "? inconclusive" in result.stdout
    assert "reference cannot run bundle t2i-fp32-nokv" in " ".join(result.stdout.split())


def test_check_exits_2_in_one_line_where_the_bundle_is_broken(lance_parity, use, bundle, replayed, tmp_path):
    use(mlx=replayed())
    (bundle / "taps.safetensors").write_bytes(b"\0" * 20)
    result = lance_parity("check", bundle, "--impl", "mlx", "--json", "r.json", "--dump", "dump")
    assert result.exit_code == 2
    one_line(result, "taps.safetensors")
    document = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert (document["verdict"], document["compared"], document["taps"]) == ("unusable", 0, [])
    assert not (tmp_path / "dump").exists()


def test_check_exits_2_in_one_line_where_the_implementation_fails(lance_parity, use, bundle):
    use(mlx=failing)
    result = lance_parity("check", bundle, "--impl", "mlx")
    assert result.exit_code == 2
    one_line(result, "mlx cannot run it: why")


def test_check_exits_2_where_the_output_cannot_be_written(lance_parity, use, bundle, replayed, tmp_path):
    use(mlx=replayed())
    (tmp_path / "file").touch()
    for option in ("--json", "--dump"):
        result = lance_parity("check", bundle, "--impl", "mlx", option, tmp_path / "file" / "x")
        assert result.exit_code == 2
        one_line(result, "cannot be written")


@pytest.mark.parametrize("arguments", [[], ["--impl", "torch"], ["--impl", "mlx", "--what"]])
def test_wrong_arguments_exit_2(lance_parity, bundle, arguments):
    assert lance_parity("check", bundle, *arguments).exit_code == 2


def test_an_interrupt_exits_130_and_leaves_nothing(lance_parity, use, bundle, tmp_path):
    use(mlx=interrupted)
    before = sorted(tmp_path.rglob("*"))
    for arguments in (("check", bundle, "--impl", "mlx", "--json", "r.json"), ("run", bundle)):
        result = lance_parity(*arguments)
        assert result.exit_code == 130
        one_line(result, "interrupted")
    assert sorted(tmp_path.rglob("*")) == before


def test_run_ends_with_the_path_of_the_report(lance_parity, use, bundle, copy_bundle, replayed, tmp_path):
    copy_bundle("t2v-fp32-nokv")
    use(mlx=replayed(), reference=replayed(name="reference"))
    result = lance_parity("run")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[-1] == "reports/latest/index.html" and (tmp_path / lines[-1]).is_file()
    assert sum("✓ agree" in line for line in lines) == 4


def test_run_reports_every_kind_of_outcome(lance_parity, use, bundle, copy_bundle, replayed, unsteady):
    others = [copy_bundle("t2v-fp32-nokv"), copy_bundle("t2i-fp32-kv")]
    (others[0] / "inputs.safetensors").unlink()
    manifest = json.loads((others[1] / "manifest.json").read_text(encoding="utf-8"))
    manifest["request"]["task"] = "depth"
    (others[1] / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    use(mlx=replayed(), reference=replayed(name="reference"))
    result = lance_parity("run", bundle.parent)
    assert result.exit_code == 2
    for words in ("✓ agree", "! unusable", "– unsupported", "no inputs.safetensors", "'depth' is none of"):
        assert words in result.stdout
    use(mlx=replayed(changed={"pixels": doubled}))
    assert lance_parity("run", bundle.parent).exit_code == 1
    assert lance_parity("run", bundle).exit_code == 1
    # What is inconclusive is no success either.
    use(mlx=unsteady("latent"))
    result = lance_parity("run", bundle)
    assert result.exit_code == 2 and "? inconclusive" in result.stdout
    # Unsupported bundles alone are no success, and beside others no failure.
    use(mlx=replayed())
    assert lance_parity("run", others[1]).exit_code == 2
    assert lance_parity("run", others[1], bundle).exit_code == 0


def test_run_without_oracles_is_an_error(lance_parity):
    result = lance_parity("run")
    assert result.exit_code == 2
    one_line(result, "oracles does not exist")


def test_layouts_prints_times_and_ignores_other_tasks(lance_parity, oracles, tmp_path):
    result = lance_parity("layouts", oracles / "layouts", "--impl", "reference")
    assert result.exit_code == 0
    assert "49353" in result.stdout and " s " in result.stdout
    assert result.stdout.count("✓ agree") == len(list((oracles / "layouts").glob("*.npz")))
    manifest = json.loads((oracles / "layouts" / "t2i-768.json").read_text(encoding="utf-8"))
    manifest["request"]["task"] = "depth"
    (tmp_path / "t2i-768.json").write_text(json.dumps(manifest), encoding="utf-8")
    (tmp_path / "t2i-768.npz").write_bytes((oracles / "layouts" / "t2i-768.npz").read_bytes())
    result = lance_parity("layouts", tmp_path)
    assert result.exit_code == 2 and "– unsupported" in result.stdout


def test_layouts_without_a_folder_is_an_error(lance_parity, tmp_path):
    result = lance_parity("layouts", tmp_path / "nothing")
    assert result.exit_code == 2
    one_line(result, "nothing")


@pytest.mark.parametrize("command", [[], ["run"], ["check"], ["layouts"]])
def test_help_tells_the_exit_status(lance_parity, command):
    result = lance_parity(*command, "--help")
    assert result.exit_code == 0
    assert not command or "Exit status: 0" in result.stdout


def test_as_a_process(oracles, tmp_path):
    command = [sys.executable, "-m", "parity.cli.main", "check", oracles / "t2i-fp32-nokv", "--impl"]
    done = subprocess.run([*command, "reference", "--dump", tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "taps.safetensors").is_file()
    refused = subprocess.run([*command[:4], tmp_path, "--impl", "mlx"], capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


INTERRUPTED_RUN = """
import os, signal, sys
from parity.cli import main as cli
from parity.lance import ports
def waiting(bundle):
    os.kill(os.getpid(), number)
    signal.pause()
ports.PORTS["mlx"] = waiting
number = int(sys.argv[2])
sys.argv = ["lance-parity", "run", sys.argv[1]]
cli.main()
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), pytest.param(signal.SIGHUP, 129, marks=pytest.mark.exhaustive)],
)
def test_an_interrupted_process_says_so_and_leaves_nothing(oracles, tmp_path, number, status):
    command = [sys.executable, "-c", INTERRUPTED_RUN, oracles, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert (done.returncode, done.stderr) == (status, "lance-parity: interrupted\n")
    assert list(tmp_path.iterdir()) == []
