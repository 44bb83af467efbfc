"""What is wrong by itself in training: nothing in a clean run, and each kind of fault by its cause."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from training_faults import named
from typer.testing import CliRunner

from parity.cli.main import app
from parity.errors import ParityError
from parity.lance.ports import PORTS
from parity.lance.training import optimizer
from parity.lance.training.bundle import GRADIENT, read_training_bundle
from parity.lance.training.faults import CATALOGUE, FAULTS
from parity.lance.training.hypotheses import HYPOTHESES, scaled
from parity.lance.training.localize import findings_of, localize_training
from parity.lance.training.names import located, owner

FOLDER = Path(__file__).parents[3] / "shared" / "oracles" / "training"
BUNDLE = FOLDER / "x2t_image-fp32"
HERE = pytest.mark.skipif(not BUNDLE.is_dir(), reason=f"there are no oracles of training in {FOLDER}")
# One of each way in which something is found: a law, a hypothesis, integers, what is added up, checkpointed, stepped.
EACH = ("no-gradient-to-keys", "rope-onwards", "labels-shifted", "ce-unweighted", "scaled-by-ranks",
        "checkpoint-learns-nothing", "norms-frozen", "eps-inside")  # fmt: skip


def findings(path: Path, *faults: str) -> list[tuple[str, str]]:
    return list(findings_of(localize_training(path, PORTS["mlx"], faults)))


@HERE
def test_nothing_is_wrong_in_a_clean_run():
    found = localize_training(BUNDLE, PORTS["mlx"])
    assert (found.verdict, list(found.findings)) == ("agree", [])
    calls = Counter(tap.tap.call for tap in found.taps)
    assert calls["forward"] > 100 and calls["backward"] > 100 and calls["gradients"] > 80
    assert {len(tap.shape) for tap in found.taps} == {0, 1, 2, 3}


@HERE
@pytest.mark.parametrize("fault", EACH)
def test_a_fault_is_named(fault):
    found = findings(BUNDLE, fault)
    assert named(CATALOGUE[fault], found), found
    assert len(found) <= 2


@HERE
def test_two_faults_are_both_found():
    found = dict(findings(BUNDLE, "silu-straight-through", "clipped-each"))
    assert found == {
        "layers.2.mlp.activation": "SiLU passes its gradient on unchanged",
        "clipping": "each parameter is clipped by itself",
    }


@HERE
@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_is_named(fault):
    order = ("x2t_image-fp32", "t2i-fp32", "i2v-fp32", "mixed-fp32")
    path = next(FOLDER / name for name in order if fault.suits(read_training_bundle(FOLDER / name)))
    assert named(fault, findings(path, fault.name))


@HERE
def test_the_command_localizes_a_bundle_of_training(tmp_path):
    given = ["localize", str(BUNDLE), "--report", str(tmp_path / "a")]
    said = CliRunner().invoke(app, [*given, "--fault", "rope-onwards"])
    assert said.exit_code == 1 and "k_rope is wrong first, in backward" in said.stdout
    assert (tmp_path / "a" / "index.html").read_text().count("turned onwards")
    said = CliRunner().invoke(app, [*given, "--fault", "unknown"])
    assert said.exit_code == 2 and "no fault of training 'unknown'" in said.stderr
    said = CliRunner().invoke(app, [*given, "--impl", "reference"])
    assert said.exit_code == 2 and "use check" in said.stderr


def test_names_are_unique_and_there_are_many_faults():
    assert len(CATALOGUE) == len(FAULTS) >= 40
    assert len({each.name for each in HYPOTHESES}) == len(HYPOTHESES)
    with pytest.raises(ParityError, match="no fault of training"):
        localize_training(BUNDLE, PORTS["mlx"], ["unknown"])


def test_a_gradient_that_arrives_wrong_is_what_reads_the_output():
    layer = "language_model.model.layers.1"
    assert owner(f"{GRADIENT}{layer}.self_attn.k_rope") == "layers.1.self_attn.sdpa"
    assert owner(f"{GRADIENT}{layer}.self_attn.k_rope.in") == "layers.1.self_attn.k_rope"
    assert owner(f"{GRADIENT}{layer}.mlp.down_proj") == "layers.1.residual"
    assert owner(f"{layer}.mlp.down_proj.weight") == "layers.1.mlp.down_proj"
    order = [f"{layer}.self_attn.q_rope", "loss", f"{GRADIENT}lm_head", f"{GRADIENT}{layer}.self_attn.q_rope",
             f"{layer}.self_attn.q_proj.weight", "total_norm", "step1/vae2llm.bias", "step2/vae2llm.bias"]  # fmt: skip
    assert sorted(order[::-1], key=lambda name: located(name).place) == order


def test_a_constant_is_said_as_a_ratio():
    (found,) = scaled(np.ones(3), np.full(3, 12 / 114), "the result")
    assert found.name == "the result is 0.1053 (2/19) times as large"
    assert scaled(np.ones(2), np.zeros(2), "it")[0].name == "it is 0"


def test_steps_simulated_without_a_change_are_pytorchs():
    random = np.random.default_rng(0)
    start = {"w": random.standard_normal((4, 3)).astype(np.float32), "b": np.ones(3, np.float32)}
    gradients = [{n: loud * random.standard_normal(each.shape).astype(np.float32) for n, each in start.items()}
                 for loud in (1.0, 0.1, 3.0)]  # fmt: skip
    settings = optimizer.OptimizerSettings(1e-2, (0.9, 0.95), 0.3, 0.3, 3, 1.0, 0.75)
    right = optimizer._torch_steps(start, gradients, settings)
    assert optimizer._apart(right, optimizer._mlx_steps(start, gradients, settings), start) < 1e-4
    assert optimizer._apart(right, optimizer._simulated(start, gradients, settings, optimizer.Changed()), start) < 1e-4
    for change in optimizer.CHANGES.values():
        assert optimizer._apart(right, optimizer._simulated(start, gradients, settings, change), start) > 1e-3, change
