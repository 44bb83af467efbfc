"""Training on both sides against what upstream computed, and against each other."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn
import mlx.optimizers as optim
import numpy as np
import pytest
import torch

from lance_mlx.model.mot import KeyValues, ScaledDotProductAttention
from lance_mlx.training import loss as mlx_loss
from lance_mlx.training import step as mlx_step
from lance_mlx.training.pack import Sample as MlxSample
from parity.errors import ParityError
from parity.lance.training.bundle import TrainingBundle, read_training_bundle
from parity.lance.training.judge import beyond, errors_of, expected, floors_of, inexact
from parity.lance.training.mlx_side import MlxTraining
from parity.lance.training.torch_side import TorchTraining, variants_of
from parity.tensors.recording import Tap
from reference.training import Optimizer, OptimizerSettings

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


# Without an oracle: other tasks, dropped conditions, answers of two lengths, the two sides against each other.

SAMPLES = [
    {"task": "t2v", "text": "a cat", "target": ""},
    {"task": "t2i", "text": "two dogs run", "target": "", "dropped": "caption"},
    {"task": "image_edit", "text": "make it blue", "media": "", "target": "", "dropped": "visuals"},
    {"task": "image_edit", "text": "make it red", "media": "", "target": ""},
    {"task": "x2t_image", "media": "", "instruction": "Look.", "question": "what", "answer": "a bird on a fence"},
    {"task": "x2t_image", "media": "", "instruction": "Look.", "question": "assistant\nsaw", "answer": "two"},
]
TRAINING = {
    "visual_gen": True, "freeze_llm_embed_tokens": False, "freeze_und_params": False, "timestep_shift": 3.0,
    "ce_weight": 0.5, "mse_weight": 2.0, "ce_loss_reweighting": True, "lr": 1e-3, "beta1": 0.9, "beta2": 0.95,
    "eps": 1e-15, "max_grad_norm": 1.0, "warmup_steps": 0, "weight_decay": 0.0,
}  # fmt: skip


@cache
def made_up(dtype: str, as_upstream: bool) -> TrainingBundle:
    """A pack whose latents, patches and noise are drawn, and what the reference makes of it; nothing is of upstream."""
    random = np.random.default_rng(3)

    def drawn(*shape: int) -> Tap:
        return Tap(random.standard_normal(shape).astype(np.float32), "float32")

    grids = [(3, 2, 2), (1, 3, 4), (1, 2, 2), (1, 3, 2), (1, 2, 3), (1, 2, 3)]
    inputs = {f"vae.latent{index}": drawn(*grid, 48) for index, grid in enumerate(grids)}
    inputs |= {f"vit_patches{index}": drawn(16, 1176) for index in range(4)}
    inputs["vit_video_grid_thw"] = Tap(np.array([(1, 4, 4)] * 4, np.int32), "int32")
    # The clean latents of the third sample are dropped.
    inputs["noise"] = drawn(sum(math.prod(grid) for grid in grids) - 4, 48)
    inputs["timesteps_raw"] = drawn(len(inputs["noise"].array))
    manifest = {
        "source": {"dtype": dtype}, "checkpoint": "checkpoint-a", "variant": "Lance_3B", "samples": SAMPLES,
        "training": TRAINING | {"as_upstream": as_upstream},
    }  # fmt: skip
    empty = TrainingBundle(ROOT / "oracles" / "training" / "made-up", manifest, inputs, {}, {}, {})
    learned = TorchTraining(replace(empty, gradients={})).run(steps=0)
    gradients = {name: Tap(array, "float32") for name, array in learned.gradients.items()}
    run = TorchTraining(replace(empty, gradients=gradients)).run()
    outputs, deltas = ({n: Tap(a, "float32") for n, a in part.items()} for part in (run.outputs, run.deltas))
    exact = {n: Tap(a.astype(np.int32 if a.dtype.kind in "ib" else np.float32), "int32" if a.dtype.kind in "ib" else
             "float32") for n, a in run.exact.items()}  # fmt: skip
    return replace(empty, inputs=inputs | exact, outputs=outputs, gradients=gradients, deltas=deltas)


@pytest.mark.parametrize(
    ("dtype", "as_upstream"),
    [
        pytest.param("float32", True, id="float32 as upstream"),
        pytest.param("bfloat16", False, id="bfloat16 as in inference"),
        pytest.param("float32", False, id="float32 as in inference", marks=pytest.mark.exhaustive),
        pytest.param("bfloat16", True, id="bfloat16 as upstream", marks=pytest.mark.exhaustive),
    ],
)
def test_both_sides_agree_on_a_pack_of_many_tasks(dtype, as_upstream):
    bundle = made_up(dtype, as_upstream)
    run, floors = MlxTraining(bundle).run(), floors_of(bundle)
    assert inexact(bundle, run) == []
    errors = errors_of(bundle, run, floors)
    assert len(errors) > 300
    assert beyond(errors, floors) == {}


def test_ten_steps_from_one_state_stay_together():
    bundle, steps = made_up("float32", True), 10
    names = [f"step{steps}/{name}" for name in bundle.gradients]

    def far(run, other) -> dict[str, float]:
        lengths = {name: np.linalg.norm(run.deltas[name]) for name in names}
        return {n: np.linalg.norm(other.deltas[n] - run.deltas[n]) / lengths[n] for n in names if lengths[n]}

    right, ours = TorchTraining(bundle).run(steps), MlxTraining(bundle).run(steps)
    variants = list(variants_of("float32").values())[1:3]
    rounded = [far(right, TorchTraining(bundle, each).run(steps)) for each in variants]
    floors = {name: max(each[name] for each in rounded) for name in rounded[0]}
    usual = float(np.median(list(floors.values())))
    errors = far(right, ours)
    assert len(errors) > 80 and max(floors.values()) < 1e-3
    assert {name: error for name, error in errors.items() if error > 4 * max(floors[name], usual)} == {}
    assert ours.outputs["loss_step10"].item() == pytest.approx(right.outputs["loss_step10"].item(), rel=1e-4)
    assert right.outputs["loss_step10"].item() < 0.9 * right.outputs["loss"].item()


def test_what_upstream_trains_otherwise_than_it_infers():
    shipped, own = made_up("float32", True), made_up("float32", False)
    ids = [bundle.inputs["text_ids"].array for bundle in (shipped, own)]
    assert len(ids[0]) > len(ids[1])  # the longer instruction of videos
    positions = [bundle.inputs["position_ids"].array for bundle in (shipped, own)]
    # Of the four pictures that a ViT sees, one is dropped and two are in questions.
    assert [int((each[0] == 1000).sum()) for each in positions] == [3, 1]
    labels = [bundle.inputs["label_ids"].array for bundle in (shipped, own)]
    assert len(labels[0]) > len(labels[1])  # the question has a line that ends in "assistant"


# The optimizer by itself.


class Parameters(torch.nn.Module):
    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        super().__init__()
        for name, array in arrays.items():
            self.register_parameter(name, torch.nn.Parameter(torch.from_numpy(array.copy())))


class MlxParameters(mlx.nn.Module):
    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        super().__init__()
        for name, array in arrays.items():
            self[name] = mx.array(array)


def test_ten_optimizer_steps_are_pytorchs():
    random = np.random.default_rng(0)
    arrays = {"w": random.standard_normal((7, 5)).astype(np.float32), "b": np.zeros(7, np.float32)}
    torch_side, mlx_side = Parameters(arrays), MlxParameters(arrays)
    settings = {"weight_decay": 0.1, "max_grad_norm": 0.5, "ema": 0.9}
    one = Optimizer(torch_side, OptimizerSettings(lr=0.01, warmup_steps=3, **settings))
    two = mlx_step.Optimizer(mlx_step.OptimizerSettings(0.01, warmup=3, **settings), mlx_side.parameters())
    for index in range(10):
        gradients = {
            n: (random.standard_normal(a.shape) * 10.0 ** -(index % 4)).astype(np.float32) for n, a in arrays.items()
        }
        norm = one.step({name: torch.from_numpy(each) for name, each in gradients.items()})
        ours = two.step(mlx_side, {name: mx.array(each) for name, each in gradients.items()})
        assert ours.item() == pytest.approx(norm.item(), rel=1e-6)
        for name, parameter in torch_side.named_parameters():
            np.testing.assert_allclose(np.array(mlx_side[name]), parameter.detach().numpy(), rtol=0, atol=2e-6)
            np.testing.assert_allclose(np.array(two.average[name]), one.average[name].numpy(), rtol=0, atol=2e-6)
        if index == 0:
            assert all(np.array_equal(np.array(mlx_side[name]), array) for name, array in arrays.items())
    assert np.abs(np.array(mlx_side["w"]) - arrays["w"]).max() > 0.03


def test_an_optimizer_goes_on_to_the_same_bits():
    random = np.random.default_rng(1)
    arrays = {"w": random.standard_normal((4, 3)).astype(np.float32)}
    gradients = [{"w": mx.array(random.standard_normal((4, 3)).astype(np.float32))} for _ in range(6)]
    settings = mlx_step.OptimizerSettings(0.01, warmup=4, ema=0.5)
    whole, first, second = (MlxParameters(arrays) for _ in range(3))
    optimizer = mlx_step.Optimizer(settings, whole.parameters())
    for each in gradients:
        optimizer.step(whole, each)
    begun = mlx_step.Optimizer(settings, first.parameters())
    for each in gradients[:3]:
        begun.step(first, each)
    resumed = mlx_step.Optimizer(settings, second.parameters())
    resumed.restore(second, begun.state())
    assert resumed.steps == 3
    for each in gradients[3:]:
        resumed.step(second, each)
    assert mx.array_equal(second["w"], whole["w"]) and mx.array_equal(resumed.average["w"], optimizer.average["w"])
