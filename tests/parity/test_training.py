"""Training on both sides against what upstream computed, forwards, backwards and two steps on."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from typer.testing import CliRunner

from lance_mlx.model.mot import KeyValues, ScaledDotProductAttention
from lance_mlx.training import loss as mlx_loss
from lance_mlx.training import step as mlx_step
from lance_mlx.training.pack import Sample as MlxSample
from parity.cli.main import app
from parity.errors import ParityError
from parity.lance.ports import PORTS
from parity.lance.training import check
from parity.lance.training.bundle import TrainingBundle, read_training_bundle
from parity.lance.training.check import NOT_OF_MLX, check_training
from parity.lance.training.judge import Limits, beyond, exact_results, expected, limits_of
from parity.lance.training.mlx_side import MlxTraining
from parity.lance.training.torch_side import TorchTraining

ROOT = Path(__file__).parents[2]
FOLDER = ROOT.parent / "shared" / "oracles" / "training"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/manifest.json"))
ABSENT = pytest.mark.skip(reason=f"there are no oracles of training in {FOLDER}")
BUNDLES = NAMES or [pytest.param("", marks=ABSENT, id="none")]
SIDES = {"reference": TorchTraining, "mlx": MlxTraining}


@cache
def bundle_of(name: str) -> TrainingBundle:
    return read_training_bundle(FOLDER / name)


@cache
def limits_for(name: str) -> Limits:
    return limits_of(bundle_of(name))


@cache
def side_of(name: str, side: str) -> TorchTraining | MlxTraining:
    return SIDES[side](bundle_of(name))


def far(name: str, run) -> dict[str, float]:
    return beyond(limits_for(name).compared(bundle_of(name), run))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", BUNDLES)
def test_forward_backward_and_two_steps_are_upstreams(name, side):
    bundle, run = bundle_of(name), side_of(name, side).run()
    assert not [r.tap.path for r in exact_results(bundle, run) if r.diverges]
    assert len(run.exact) >= 5
    results = limits_for(name).compared(bundle, run)
    assert beyond(results) == {}
    right = expected(bundle)
    missing = set(right.outputs) | set(right.gradients) | set(right.deltas)
    missing -= {result.tap.name for result in results}
    assert missing - (NOT_OF_MLX if side == "mlx" else set()) == set()
    assert run.gradients.keys() == right.gradients.keys()
    # Rows that are left out matter to nothing: the loss has no gradient there.
    for tap in ("grad/hidden_in", "grad/last_hidden_state"):
        assert not right.outputs[tap][~run.rows].any()
    for gradient in bundle.manifest["zero_gradients"]:
        assert not run.gradients[gradient].any()


@pytest.mark.parametrize("name", BUNDLES)
def test_floors_are_those_of_rounding(name):
    bounds, single = limits_for(name).bounds.taps, bundle_of(name).dtype == "float32"
    floors = {tap: bound.floor for tap, bound in bounds.items()}
    gradients = [floors[parameter] for parameter in bundle_of(name).gradients if floors[parameter]]
    assert 1e-7 < min(gradients) and max(gradients) < (1e-5 if single else 0.1)
    assert max(value for tap, value in floors.items() if tap.startswith("step")) < (2e-3 if single else 0.01)


@contextmanager
def patched(owner, name: str, value) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


def stopped_keys():
    original = ScaledDotProductAttention.__call__
    return patched(ScaledDotProductAttention, "__call__", lambda self, q, kv, causal: original(
        self, q, KeyValues(mx.stop_gradient(kv.keys), kv.values), causal))  # fmt: skip


def wrong_count():
    original = mlx_loss.Totals.of.__func__
    counted = classmethod(lambda cls, samples, settings: original(cls, samples, settings)._replace(latents=16))
    return patched(mlx_loss.Totals, "of", counted)


def weighted_once_more():
    original = mlx_step.losses_of
    again = lambda found, sample, totals, settings: original(found, sample, totals, settings)._replace(  # noqa: E731
        loss=original(found, sample, totals, settings).mse)  # fmt: skip
    return patched(mlx_step, "losses_of", again)


def shifted_labels():
    return patched(MlxSample, "labels", property(lambda self: np.roll(self.sequence.ids[self.answer or 10**6 :], 1)))


def turned_target():
    original = mlx_loss.flow_state
    turned = lambda *given: original(*given)._replace(velocity=-original(*given).velocity)  # noqa: E731
    return patched(mlx_loss, "flow_state", turned)


def no_bias_correction():
    original = optim.AdamW.__init__
    return patched(optim.AdamW, "__init__", lambda self, *given, bias_correction: original(self, *given))


def another_decay():
    original = optim.AdamW.__init__
    return patched(optim.AdamW, "__init__", lambda self, rate, betas, eps, decay, bias_correction: original(
        self, rate, [0.9, 0.999], eps, decay, bias_correction))  # fmt: skip


FAULTS: dict[str, tuple[Callable, str, str]] = {
    "no gradient through the keys": (stopped_keys, "t2i-fp32", "language_model.model.layers.0.self_attn.k_proj.weight"),
    "averaged over the wrong count": (wrong_count, "t2i-fp32", "loss"),
    "answers not learned": (weighted_once_more, "mixed-fp32", "loss"),
    "labels shifted": (shifted_labels, "x2t_image-fp32", "ce"),
    "from noise to data": (turned_target, "i2v-fp32", "mse"),
    "no bias correction": (no_bias_correction, "t2i-fp32", "step1/vae2llm.weight"),
    "another beta": (another_decay, "i2v-fp32", "step2/language_model.model.layers.1.input_layernorm.weight"),
}


@pytest.mark.skipif(not NAMES, reason=f"there are no oracles of training in {FOLDER}")
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_beyond_its_floor(fault):
    broken, name, seen = FAULTS[fault]
    with broken():
        run = side_of(name, "mlx").run()
    assert seen in far(name, run)


@pytest.mark.skipif(not NAMES, reason=f"there are no oracles of training in {FOLDER}")
def test_integers_that_differ_are_named():
    bundle, run = bundle_of("mixed-fp32"), side_of("mixed-fp32", "reference").run(steps=0)
    exact = copy.deepcopy(run.exact)
    exact["mask"][200, 10] ^= True
    exact["position_ids"][0, 3] += 1
    exact["x_t"] = exact["x_t"] * np.float32(1 + 1e-5)
    results = exact_results(bundle, type(run)(exact, {}, {}, run.rows))
    assert [r.tap.path for r in results if r.diverges] == ["position_ids", "mask", "x_t"]


def test_a_folder_without_a_bundle_is_named(tmp_path):
    with pytest.raises(ParityError, match="manifest.json cannot be read"):
        read_training_bundle(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(ParityError, match="'other' is not lance-training-oracle"):
        read_training_bundle(tmp_path)


# The command.


@pytest.mark.skipif(not NAMES, reason=f"there are no oracles of training in {FOLDER}")
def test_check_takes_a_bundle_of_training(tmp_path):
    given = ["check", str(FOLDER / "x2t_image-fp32"), "--impl", "mlx"]
    said = CliRunner().invoke(app, [*given, "--json", str(tmp_path / "a.json")])
    assert said.exit_code == 0, said.stderr
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["verdict"], found["task"], found["compared"]) == ("agree", "training", 142)
    assert {tap["call"] for tap in found["taps"]} == {"forward", "backward", "gradients", "step1", "step2"}
    said = CliRunner().invoke(app, [*given, "--dump", str(tmp_path)])
    assert said.exit_code == 2 and "leave --quantize, --dump and --ranks out" in said.stderr


@pytest.mark.skipif(not NAMES, reason=f"there are no oracles of training in {FOLDER}")
def test_a_bundle_that_the_reference_does_not_compute_judges_nobody(monkeypatch):
    bundle = copy.deepcopy(bundle_of("x2t_image-fp32"))
    bundle.gradients["language_model.model.layers.1.mlp.up_proj.weight"].array[3] *= np.float32(1.01)
    monkeypatch.setattr(check, "read_training_bundle", lambda path: bundle)
    found = check_training(bundle.path, PORTS["mlx"])
    assert found.verdict == "inconclusive" and "layers.1.mlp.up_proj.weight" in found.reason


@pytest.mark.skipif(not NAMES, reason=f"there are no oracles of training in {FOLDER}")
def test_what_diverges_first_is_first_in_execution():
    with labels_of_two_more():
        found = check_training(FOLDER / "x2t_image-fp32", PORTS["mlx"])
    assert found.verdict == "diverge" and found.first_divergence["tap"] == "loss.ce"


def labels_of_two_more():
    original = mlx_loss.Totals.of.__func__
    counted = lambda cls, samples, settings: original(cls, samples, settings)._replace(labels=5.0)  # noqa: E731
    return patched(mlx_loss.Totals, "of", classmethod(counted))
