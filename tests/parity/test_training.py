"""Training on both sides against what upstream computed, forwards, backwards and two steps on."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from lance_mlx.model.mot import KeyValues, ScaledDotProductAttention
from lance_mlx.training import loss as mlx_loss
from lance_mlx.training import step as mlx_step
from lance_mlx.training.pack import Sample as MlxSample
from parity.errors import ParityError
from parity.lance.training.bundle import TrainingBundle, read_training_bundle
from parity.lance.training.judge import beyond, errors_of, expected, floors_of, inexact
from parity.lance.training.mlx_side import MlxTraining
from parity.lance.training.torch_side import TorchTraining

ROOT = Path(__file__).parents[2]
FOLDER = ROOT.parent / "shared" / "oracles" / "training"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/manifest.json"))
ABSENT = pytest.mark.skip(reason=f"there are no oracles of training in {FOLDER}")
BUNDLES = NAMES or [pytest.param("", marks=ABSENT, id="none")]
SIDES = {"reference": TorchTraining, "mlx": MlxTraining}
# What mlx has in another form: an embedding for each distinct time, which its parameters' gradients stand for.
NOT_OF_MLX = {"time_embedder", "grad/time_embedder"}


@cache
def bundle_of(name: str) -> TrainingBundle:
    return read_training_bundle(FOLDER / name)


@cache
def floors_for(name: str) -> dict[str, float]:
    return floors_of(bundle_of(name))


@cache
def side_of(name: str, side: str) -> TorchTraining | MlxTraining:
    return SIDES[side](bundle_of(name))


def errors_for(name: str, run) -> dict[str, float]:
    return errors_of(bundle_of(name), run, floors_for(name))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", BUNDLES)
def test_forward_backward_and_two_steps_are_upstreams(name, side):
    bundle, run = bundle_of(name), side_of(name, side).run()
    assert inexact(bundle, run) == []
    assert len(run.exact) >= 5
    errors = errors_for(name, run)
    assert beyond(errors, floors_for(name)) == {}
    right = expected(bundle)
    missing = set(right.outputs) | set(right.gradients) | set(right.deltas)
    missing -= set(errors)
    assert missing - (NOT_OF_MLX if side == "mlx" else set()) == set()
    assert run.gradients.keys() == right.gradients.keys()
    # Rows that are left out matter to nothing: the loss has no gradient there.
    for tap in ("grad/hidden_in", "grad/last_hidden_state"):
        assert not right.outputs[tap][~run.rows].any()
    for gradient in bundle.manifest["zero_gradients"]:
        assert not run.gradients[gradient].any()


@pytest.mark.parametrize("name", BUNDLES)
def test_floors_are_those_of_rounding(name):
    floors, single = floors_for(name), bundle_of(name).dtype == "float32"
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
    assert seen in beyond(errors_for(name, run), floors_for(name))


@pytest.mark.skipif(not NAMES, reason=f"there are no oracles of training in {FOLDER}")
def test_integers_that_differ_are_named():
    bundle, run = bundle_of("mixed-fp32"), side_of("mixed-fp32", "reference").run(steps=0)
    exact = copy.deepcopy(run.exact)
    exact["mask"][200, 10] ^= True
    exact["position_ids"][0, 3] += 1
    exact["x_t"] = exact["x_t"] * np.float32(1 + 1e-5)
    assert inexact(bundle, type(run)(exact, {}, {}, run.rows)) == ["position_ids", "mask", "x_t"]


def test_a_folder_without_a_bundle_is_named(tmp_path):
    with pytest.raises(ParityError, match="manifest.json cannot be read"):
        read_training_bundle(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(ParityError, match="'other' is not lance-training-oracle"):
        read_training_bundle(tmp_path)
