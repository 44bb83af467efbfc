"""What lance-parity does with files that are not what they should be: status 2, never the one of a divergence."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from parity.cli.main import app, main
from parity.errors import ParityError
from parity.lance.record_options import Options, build_request
from parity.oracle.verify import verify_bundle

DEEP = "[" * 100_000


@pytest.fixture
def copied(oracles, tmp_path):
    """A bundle that may be damaged."""
    shutil.copytree(oracles / "checkpoint-a", tmp_path / "checkpoint-a")
    return shutil.copytree(oracles / "t2i-fp32-nokv", tmp_path / "t2i-fp32-nokv")


def refused(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize("key", ["name", "dtype", "shape"])
@pytest.mark.parametrize("value", [["a"], {"a": 1}, None, 3])
def test_a_tap_of_another_type_is_one_line(copied, key, value):
    if key == "shape" and value == ["a"]:
        value = "a"
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["taps"][0][key] = value
    path.write_text(json.dumps(manifest))
    assert "lists a tap without a name, a shape or a known dtype" in refused("check", copied, "--impl", "reference")


@pytest.mark.parametrize("key", ["source", "request", "taps", "format", "checkpoint", "variant", "level", "sketches"])
@pytest.mark.parametrize("value", [["a"], {"a": ["b"]}, 3])
def test_a_manifest_with_another_type_is_one_line(copied, key, value):
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    if key in manifest or key == "level":
        path.write_text(json.dumps(manifest | {key: value}))
        assert "t2i-fp32-nokv" in refused("check", copied, "--impl", "reference")


def test_deep_json_and_pipes_are_one_line(copied):
    path = copied / "manifest.json"
    path.write_text(DEEP)
    assert "manifest.json is not JSON" in refused("check", copied, "--impl", "reference")
    path.unlink()
    os.mkfifo(path)
    assert "has no manifest.json" in refused("check", copied, "--impl", "reference")


STEERING = "\x1b[31m\u202e[/red]\ud800" + "a" * 5000


def test_names_that_would_steer_a_terminal_are_shown_escaped(copied):
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"checkpoint": STEERING, "source": manifest["source"] | {"commit": "[/a]"}}))
    for command in (["verify"], ["oracles"], ["check", "--impl", "mlx"]):
        result = CliRunner().invoke(app, [command[0], str(copied), *command[1:]])
        assert result.exit_code == 2 and "Traceback" not in result.output, result.output
        assert "\\x1b[31m\\u202e[/red]\\ud800aa" in result.output, result.output
        assert len(result.output) < 4000
        assert all(letter.isprintable() for letter in result.output.replace("\n", ""))


def test_taps_with_names_of_nothing_are_refused(copied, tmp_path):
    tensors = load_file(copied / "inputs.safetensors")
    save_file(tensors | {"a": tensors["text_ids"].clone()}, copied / "inputs.safetensors")
    line = refused("check", copied, "--impl", "reference")
    assert "inputs.safetensors of bundle t2i-fp32-nokv: tap 'inputs/a' has no known call" in line
    save_file({"\x1b[31m": tensors["text_ids"]}, tmp_path / "taps.safetensors")
    assert r"calls a tensor '\x1b[31m'" in refused("compare", tmp_path, tmp_path)


def test_a_stream_is_refused_for_taps_that_are_not_as_listed(oracles, tmp_path):
    (tmp_path / "checkpoint-a").symlink_to(oracles / "checkpoint-a")
    path = shutil.copytree(oracles / "t2i-fp32-kv", tmp_path / "t2i-fp32-kv") / "taps.safetensors"
    taps = load_file(path)
    one, other = "pixels", "latent"
    save_file(taps | {one: taps[other], other: taps[one]}, path)
    assert "has shape" in refused("stream", "--against", path.parent)


def test_an_error_of_its_own_is_no_divergence(copied, monkeypatch):
    def broken(path):
        raise TypeError("unhashable")

    monkeypatch.setattr("parity.bundle.reading.read_bundle", broken)
    monkeypatch.setattr("parity.comparison.check.read_bundle", broken)
    result = CliRunner().invoke(app, ["check", str(copied), "--impl", "reference"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "lance-parity: this should not happen: TypeError, as told above"


@pytest.mark.parametrize("command", ["verify", "check", "oracles", "compare", "localize", "port", "layouts"])
def test_a_name_that_no_disk_takes_is_one_line(command):
    more = {"check": ["--impl", "mlx"], "compare": ["."]}.get(command, [])
    assert " cannot be used: File name too long" in refused(command, "a" * 5000, *more)


def test_help_and_version_import_nothing_large():
    script = "import sys, parity.cli.main as c\ntry: c.main()\nexcept SystemExit: pass\n"
    script += "assert not {'torch', 'mlx', 'numpy'} & set(sys.modules)"
    for option in ("-h", "--version"):
        done = subprocess.run([sys.executable, "-c", script, option], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, done.stderr


def test_mlx_is_imported_after_lance_mlx_and_that_after_torch():
    script = "import sys, parity, mlx.core; print(*[n for n in sys.modules if n in ('torch', 'lance_mlx', 'mlx')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["torch", "lance_mlx", "mlx"], done.stderr


def test_the_subject_driven_task_has_both_names(tmp_path):
    options = Options(prompt="a", images=(tmp_path / "a.png",), width=64, height=64)
    assert build_request("subject", options) == build_request("idip", options)
    with pytest.raises(ParityError, match="needs an --image"):
        build_request("subject", Options(prompt="a"))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["verify", "a", "--jsn"], "No such option: --jsn; lance-parity verify -h lists what there is"),
        (["nothing"], "No such command 'nothing'; lance-parity -h lists what there is"),
        (["record"], "Missing argument"),
        (["layouts", "a", "--impl", "b"], "--impl 'b'"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line(monkeypatch, capsys, given, line):
    monkeypatch.setattr(sys, "argv", ["lance-parity", *given])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(f"lance-parity: {line}") and said.count("\n") == 1, said


REPORTING = {
    "run": ["/nope"],
    "check": ["/nope", "--impl", "mlx"],
    "localize": ["/nope"],
    "compare": ["/nope", "@mlx"],
    "stream": ["--against", "/nope"],
    "port": ["/nope.py"],
}


@pytest.mark.parametrize("command", REPORTING)
def test_outputs_that_cannot_be_written_are_refused_before_anything_runs(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [command, *REPORTING[command]]
    assert "x.fifo ends in none of .md, .json, .csv, .xml" in refused(*given, "--output", "x.fifo")
    (tmp_path / "x.MD").mkdir()
    option = "--output" if command == "compare" else "--json"
    assert "x.MD is a folder: name a file in it" in refused(*given, option, "x.MD")
    assert "/nope" in refused(*given, "--output", "y.MD")


@pytest.mark.parametrize("command", ["run", "localize", "port"])
def test_a_report_is_a_folder_of_its_own_in_every_command(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [command, *REPORTING[command], "--report"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert "mine holds thesis.txt, which lance-parity did not write" in refused(*given, "mine")
    for around in (".", "..", ""):
        assert "cannot take a report (it is where the command runs): name another folder" in refused(*given, around)
    assert "mine/thesis.txt cannot take a report" in refused(*given, "mine/thesis.txt")
    assert "thesis.txt is not a folder" in refused(*given, "mine/thesis.txt/report")
    assert "out/a.json is in out, which the report takes for itself" in refused(*given, "out", "--json", "out/a.json")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["request"].update(height="64"), "height must be a positive integer, not '64': restore it, or"),
        (lambda m: m["request"].update(cfg_img_scale=1), "unknown request key 'cfg_img_scale': restore it, or capture"),
        (lambda m: m["taps"][0].update(shape=[1]), "its manifest says [1]: copy both again"),
        (lambda m: m["taps"].clear(), "lists no taps: copy its manifest.json again, or capture it again"),
        (lambda m: m["source"].update(dtype="float8"), "has dtype 'float8', not float32 or bfloat16: restore it"),
    ],
)
def test_what_is_wrong_with_a_manifest_comes_with_its_remedy(copied, change, words):
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    assert words in refused("check", copied, "--impl", "mlx")


def test_what_is_not_there_is_told_so(copied):
    for command in (["check", "--impl", "mlx"], ["localize"], ["floors"], ["oracles"], ["verify"], ["run"]):
        assert "/nope does not exist: name " in refused(command[0], "/nope", *command[1:])
    words = "there is no recipe '3.5': give bits such as 4 or 8, 8bit, small, or a JSON file"
    assert words in refused("check", copied, "--impl", "mlx", "--quantize", "3.5")


def test_a_weight_that_is_no_number_comes_with_its_remedy(copied):
    path = copied.parent / "checkpoint-a" / "Lance_3B" / "model.safetensors"
    weights = load_file(path)
    weights["llm2vae.bias"][0] = float("nan")
    save_file(weights, path)
    for command in (["check", "--impl", "mlx"], ["localize"]):
        assert "holds NaN or infinite values: fetch the file again" in refused(command[0], copied, *command[1:])
    (problem,) = verify_bundle(copied).problems
    assert problem.place == "reference" and problem.what.startswith("cannot run bundle t2i-fp32-nokv: ")
    assert problem.what.endswith("fetch the file again")
