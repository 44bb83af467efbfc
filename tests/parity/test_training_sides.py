"""The two sides of training against each other, where there is no oracle: other tasks, dropped conditions, answers of
two lengths, ten steps; and the optimizer by itself against PyTorch's."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from lance_mlx.training import step as mlx_step
from lance_mlx.training.parts import Trained, train_parts
from parity.lance.training.bundle import TrainingBundle
from parity.lance.training.judge import beyond, exact_results, limits_of
from parity.lance.training.mlx_side import MlxTraining
from parity.lance.training.torch_side import TorchTraining, variants_of
from parity.tensors.recording import Tap
from reference.training import Optimizer, OptimizerSettings, train_parameters

ROOT = Path(__file__).parents[2]
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
    run = MlxTraining(bundle).run()
    assert not [r.tap.path for r in exact_results(bundle, run) if r.diverges]
    results = limits_of(bundle).compared(bundle, run)
    assert len(results) > 300
    assert beyond(results) == {}


def test_labels_beyond_the_vocabulary_are_not_learned():
    sides = TorchTraining(made_up("float32", False)), MlxTraining(made_up("float32", False))
    for side in sides:
        side.vocabulary = 300
    theirs, ours = (side.run(steps=0) for side in sides)
    known = theirs.exact["label_ids"] < 300
    assert known.any() and not known.all()
    assert np.array_equal(theirs.outputs["ce"] > 0, known) and np.array_equal(ours.outputs["ce"] > 0, known)
    np.testing.assert_allclose(ours.outputs["ce"], theirs.outputs["ce"], rtol=1e-5)
    assert ours.outputs["loss.ce"].item() == pytest.approx(theirs.outputs["loss.ce"].item(), rel=1e-5)


@cache
def outlines():
    return tuple(kind(made_up("float32", False)).model for kind in (TorchTraining, MlxTraining))


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("understanding", [True, False])
@pytest.mark.parametrize("drawing", [True, False])
def test_both_sides_learn_the_same_parts(embeddings, understanding, drawing):
    torch_side, mlx_side = outlines()
    train_parameters(torch_side, embeddings, understanding, drawing)
    train_parts(mlx_side, Trained(embeddings, understanding, drawing=drawing))
    theirs = {name for name, each in torch_side.named_parameters() if each.requires_grad}
    ours = {name for name, _ in tree_flatten(mlx_side.trainable_parameters())}
    assert ours == theirs and len(ours) >= 40


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
