"""Ports from a file of the user's: found, asked for what they have, and judged like any other."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import parity
from parity.bundle.reading import read_bundle
from parity.cli.main import app
from parity.comparison.check import check_bundle
from parity.errors import ParityError
from parity.localize.investigation import localize
from parity.ports.loading import port_loader
from parity.tensors.recording import Tap

SMALL = "t2i-fp32-nokv"
HEAD = """
from parity.lance.ports import MlxPort
from parity.tensors.recording import ExactInputs, Tap
class Given:
    def __init__(self, bundle):
        self.inner = MlxPort(bundle)
    def run(self, probe):
        force = {name: Tap(*held) for name, held in probe.force.items()}
        exact = ExactInputs(probe.splits, probe.answer, probe.given) if probe.given else None
        found = self.inner.run(probe.names, force, exact, probe.progress)
        for name, tap in found.recording.items():
            probe.value(name, tap.array)
        for name, tap in found.exact.items():
            probe.integers(name.removeprefix("inputs/"), tap.array)
    def weights(self):
        return self.inner.weights()
"""
OWN = {
    "Right": "class Right(Given): pass",
    "Wrong": """
class Wrong(Given):
    name = "my port"
    def run(self, probe):
        import lance_mlx.sampling.flow as flow
        real = flow.guided_velocity
        flow.guided_velocity = lambda *args: real(*args) * 1.01
        try:
            return super().run(probe)
        finally:
            flow.guided_velocity = real
""",
    "Deaf": """
class Deaf(Given):
    def run(self, probe):
        given, probe.force = probe.force, {}
        super().run(probe)
        probe.force = given
""",
    "Broken": """
class Broken(Given):
    def run(self, probe):
        raise ValueError("no\\n    memory")
""",
    "unloadable": """
def unloadable(bundle):
    raise KeyError("weights")
""",
    "Shifted": """
class Shifted(Given):
    def weights(self):
        for name, value in self.inner.weights():
            yield name, value + ("layers.0.input_layernorm.weight" in name)
""",
    "Empty": """
class Empty:
    def __init__(self, bundle): pass
""",
    "number": "number = 3",
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """Writes a port and names it."""
    folder = tmp_path_factory.mktemp("ports")

    def write(name):
        path = folder / f"{name.lower()}_port.py"
        path.write_text(HEAD + OWN[name])
        return f"{path}:{name}"

    return write


@pytest.mark.parametrize("python", [None, Path(sys.executable)])
def test_a_right_port_agrees_everywhere(oracles, spec, python):
    bundle, load = oracles / SMALL, port_loader(spec("Right"), python)
    checked, localized = check_bundle(bundle, load), localize(bundle, load)
    assert checked.verdict == localized.verdict == "agree" and not localized.findings
    assert checked.impl == localized.impl == "right_port:Right"


MADE_UP = Path(__file__).with_name("made_up_port.py")
CLOSING = "the closing <|im_end|> is missing"


def test_a_port_that_shares_little_is_judged_on_that(oracles):
    for name in ("t2i-fp32-kv", "t2i-fp32-nokv"):
        found = localize(oracles / name, f"{MADE_UP}:Right")
        assert [finding.explanations[0].name for finding in found.findings] == [CLOSING]
        assert "it does not tell" in found.remark and "it has not all rows of " in found.remark


def test_each_of_its_mistakes_is_named(oracles):
    found = localize(oracles / "t2i-fp32-kv", f"{MADE_UP}:Wrong")
    named = {finding.explanations[0].name: finding.explanations[0].residual_removed for finding in found.findings}
    assert all(removed > 0.95 for removed in named.values())
    assert set(named) == {
        CLOSING,
        "the target's grid starts at 0",
        "the target's closing bracket restarts behind its grid",
        "the activation is on up instead of the gate",
        "latents do not see their closing bracket",
        "the renorm is per token",
    }


def test_a_port_takes_the_place_of_a_run(oracles, spec):
    bundle = oracles / SMALL
    assert parity.compare(bundle, f"{bundle}@{spec('Right')}").verdict == "agree"


def test_a_wrong_one_is_told_what_is_wrong(oracles, spec):
    bundle = oracles / "t2i-fp32-kv"
    checked, localized = check_bundle(bundle, spec("Wrong")), localize(bundle, spec("Wrong"))
    assert checked.first_divergence["component"] == localized.first.component == "guidance"
    assert checked.impl == localized.impl == "my port"
    assert {finding.component for finding in localized.findings} == {"guidance"}


def test_one_that_takes_no_values_is_not_localized(oracles, spec):
    assert check_bundle(oracles / "t2i-fp32-kv", spec("Deaf")).verdict == "agree"
    found = localize(oracles / "t2i-fp32-kv", spec("Deaf"))
    assert found.verdict == "inconclusive" and not found.findings
    assert (
        "deaf_port:Deaf does not go on with the values that it is given, such as that at cond.prefix0/" in found.reason
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Broken", "broken_port:Broken cannot run bundle t2i-fp32-nokv: ValueError: no memory"),
        ("unloadable", "unloadable cannot be loaded for bundle t2i-fp32-nokv: KeyError: 'weights'"),
        ("Empty", "has no method run: examples/README.md says what a port needs"),
        ("number", "defines no class or function 'number': name one that is given the bundle"),
    ],
)
def test_what_is_no_port_is_one_line(oracles, spec, name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("check", "localize"):
        done = CliRunner().invoke(app, [command, str(oracles / SMALL), "--impl", spec(name)])
        # What ends the steered run of a port is a finding.
        status = 1 if (name, command) == ("Broken", "localize") else 2
        assert done.exit_code == status and message.split(":")[0] in " ".join((done.stdout + done.stderr).split())
    with pytest.raises(ParityError, match="^[^\n]*$"):
        check_bundle(oracles / SMALL, spec(name))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nothing.py:Port", "there is no Python file nothing.py"),
        ("tinygrad", "there is no implementation 'tinygrad': name mlx, reference, or FILE.py:NAME"),
    ],
)
def test_a_port_that_is_not_there_is_one_line(given, message):
    with pytest.raises(ParityError, match=message):
        port_loader(given)


def test_a_run_compares_a_given_port(oracles, spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["run", str(oracles / SMALL), "--impl", spec("Right"), "--format", "json", "--json", "run.json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0
    assert [row["impl"] for row in json.loads(done.stdout)["results"]] == ["right_port:Right"]
    assert json.loads((tmp_path / "run.json").read_text()) == json.loads(done.stdout)


def test_a_check_compares_the_weights_that_a_given_port_uses_first(oracles, spec):
    found = check_bundle(oracles / SMALL, spec("Shifted"))
    name = "weights/language_model.model.layers.0.input_layernorm.weight"
    assert found.verdict == "diverge" and found.first_divergence["tap"] == found.inputs[0].tap.name == name
    assert not any(result.diverges for result in found.taps)


@pytest.mark.parametrize("python", [None, Path(sys.executable)], ids=["here", "apart"])
def test_an_error_names_the_line_of_the_ports_file(misused, python):
    with pytest.raises(ParityError, match=r"ZeroDivisionError: division by zero \(port_300\.py:5\)$"):
        misused(300, "1 / 0", python=python).run(set())
    with pytest.raises(ParityError, match=r"ValueError: latent is NoneType: [^\n]* \(port_301\.py:5\)$"):
        misused(301, "probe.value('latent', None)", python=python).run({"latent"})
    with pytest.raises(ParityError, match=r"NameError: name 'nothing' is not defined \(port_302\.py:7\)$"):
        list(misused(302, weights="nothing", python=python).weights())


def test_weights_that_cannot_be_replaced_stay(oracles, spec):
    port = port_loader(spec("Right"))(read_bundle(oracles / SMALL))
    with port.with_weights({"x": np.zeros(1)}):
        assert port.preprocessed(oracles) is None and "python" in port.versions()


MISUSED = {
    "probe.value('latent', None)": "latent is NoneType: give an array of float32, bfloat16 or integers",
    "probe.value('latent', np.zeros(3, 'float16'))": "latent is float16: give an array of float32",
    "probe.value('latent', np.zeros(3, 'complex64'))": "latent is complex64: give an array of float32",
    "probe.value('no_such_tap', np.zeros(3, 'float32'))": "lists the names (port_3.py:5)",
    "probe.integers('no such thing', [1])": "lists the names (port_4.py:5)",
    "for i in range(2): probe.value('latent', np.full(3, i, 'float32'))": "latent is told twice, of different values",
    "for i in range(2): probe.integers('text_ids', [i])": "inputs/text_ids is told twice, of different values",
    "probe.call({'cond.prefix0': [0]}); [probe.rows('hidden_in', np.full((1, 2), i, 'float32')) for i in range(2)]": (
        "cond.prefix0/hidden_in is told twice, of different values"
    ),
    "probe.integers('text_ids', [1, 2], np.ones(5, bool))": "inputs/text_ids: shared names 5 values",
    "probe.rows('hidden_in', np.zeros((2, 3), 'float32'))": "comes before any probe.call",
    "probe.call(['cond.prefix0'])": "probe.call is given list: give {call: rows}",
    "probe.call({'cond.prefix0': [0.5]})": "the rows of cond.prefix0 are no list of row numbers",
    "probe.call({'cond.prefix0': range(-9, -3)})": "the rows of cond.prefix0 are no list of row numbers",
    "probe.call({'cond.prefix0': [7]}); probe.rows('hidden_in', np.zeros((2, 3), 'float32'))": (
        "cond.prefix0/hidden_in: row 7 was named in probe.call, the array has 2"
    ),
    "probe.call({'cond.prefix0': [0]}); probe.rows('hidden_in', np.zeros((2, 3), 'float32'), of=np.ones(5, bool))": (
        "hidden_in: of is bool [5], not a boolean for each of 2 rows"
    ),
    "probe.call({'nonsense': [0]}); probe.rows('hidden_in', np.zeros((2, 3), 'float32'))": (
        "tap 'nonsense/hidden_in' has no known call"
    ),
    "raise SystemExit(0)": "cannot run bundle t2i-fp32-nokv: SystemExit: 0",
}
WEIGHTS = {
    "('x', 'abc')": "weight x is str: yield a NumPy array",
    "('x', None)": "weight x is NoneType: yield a NumPy array",
    "'justone'": "yields str|ValueError",
    "('x', np.zeros(2)), ('x', np.ones(2))": "weight x is told twice",
}


@pytest.fixture(scope="module")
def misused(oracles, tmp_path_factory):
    """Makes a port that does something, in this process or in one of its own."""
    folder = tmp_path_factory.mktemp("misused")

    def make(number, run="pass", weights="", python=None):
        path = folder / f"port_{number}.py"
        path.write_text(
            "import numpy as np\n"
            "class Port:\n"
            "    def __init__(self, bundle): pass\n"
            f"    def run(self, probe):\n        {run}\n"
            f"    def weights(self):\n        return iter([{weights}])\n"
        )
        return port_loader(f"{path}:Port", python)(read_bundle(oracles / SMALL))

    return make


@pytest.mark.parametrize("python", [None, Path(sys.executable)], ids=["here", "apart"])
def test_what_a_port_does_wrong_is_one_line_that_names_it(misused, python):
    for number, (run, message) in enumerate(MISUSED.items()):
        with pytest.raises(ParityError, match=f"^[^\n]*{re.escape(message)}[^\n]*$"):
            misused(number, run, python=python).run({"latent", "cond.prefix0/hidden_in"})
    for number, (weights, message) in enumerate(WEIGHTS.items(), 100):
        with pytest.raises(ParityError, match=f"^[^\n]*({message})[^\n]*$"):
            list(misused(number, weights=weights, python=python).weights())


def test_what_is_told_again_is_the_same_or_of_another_call(misused):
    one = "probe.call({'cond.prefix0': [0]}); probe.rows('hidden_in', np.full((1, 2), i, 'float32'))"
    again = f"for i in range(2): {one}"
    found = misused(400, again).run({"cond.prefix0/hidden_in"})
    assert found.recording["cond.prefix0/hidden_in"].array.tolist() == [[0, 0]]
    same = "for i in range(2): probe.value('latent', np.full(3, np.nan, 'float32'))"
    assert list(misused(401, same).run({"latent"}).recording) == ["latent"]
    led = {"latent": Tap(np.ones(3, np.float32), "float32")}
    misused(402, "x = probe.value('latent', np.zeros(3, 'float32')); probe.value('latent', x)").run({"latent"}, led)


def test_a_process_that_ends_is_one_line(misused, oracles, tmp_path):
    with pytest.raises(ParityError, match="was ended by signal 11|was ended by signal 9"):
        misused(200, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", python=Path(sys.executable)).run(set())
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexit 0\n")
    silent.chmod(0o755)
    for python, message in (
        (silent, "--python has to be a Python with NumPy"),
        (tmp_path, "cannot be run: Permission denied; name the Python that has the port's packages"),
        (tmp_path / "none", "cannot be run: No such file or directory"),
    ):
        with pytest.raises(ParityError, match=f"^[^\n]*{re.escape(message)}[^\n]*$"):
            misused(201, python=python)


def test_a_process_ends_with_the_one_that_began_it(misused):
    port = misused(202, "import time; time.sleep(600)", python=Path(sys.executable))
    process = port._process
    port._end()
    assert process.poll() is not None
