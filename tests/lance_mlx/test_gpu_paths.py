"""What runs where MLX has a GPU, run on the CPU: other branches, other kernels and compiled functions, one result."""

import io
import shutil
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest

from lance_mlx import FLOAT32, Question, Request, Task, Visual, VisualKind, load
from lance_mlx.model import attention, layers, mot, rope, vae_layers, vit
from lance_mlx.sampling import flow, text

SMALL = {"width": 48, "height": 32, "num_steps": 2}
LOOKS = {"vae_resolution": 64, "vit_resolution": 56, "num_steps": 2}


@contextmanager
def as_on_a_gpu(compiled: bool):
    """Takes every branch that is for other backends than the CPU's."""
    with ExitStack() as stack:
        for module in (attention, flow, layers, mot, text, vae_layers, vit):
            stack.enter_context(patch.object(module, "runs_on_cpu", return_value=False))
        stack.enter_context(patch.object(mot, "FREE_BYTES", 4096))
        if not compiled:
            mx.disable_compile()
            stack.callback(mx.enable_compile)
        yield


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_what_is_compiled_can_be_traced_for_all_shapes(dtype):
    # Nothing is evaluated, which would take a C++ compiler.
    with as_on_a_gpu(compiled=True):
        for rows in (1, 7):
            x, table = mx.zeros((rows, 2, 8), dtype), mx.zeros((rows, 1, 4), dtype)
            rotary = rope.RotaryTable(np.zeros((3, rows), np.int32), table, table)
            assert {x.shape} == {y.shape for y in (layers._swiglu(x, x), rope.Rotary()(x, rotary), vit._gelu(x))}


def test_large_layers_are_given_in_step(checkpoint, monkeypatch):
    begun, original = [], mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: (begun.append(len(arrays)), original(*arrays))[1])
    model = load(checkpoint, FLOAT32)
    with as_on_a_gpu(compiled=False):
        model.generate(Request(Task.T2I, "a bird", **SMALL))
        # Of the prefixes and of two steps, one guided, some passes are large enough.
        assert len(begun) >= 2 * 3
        begun.clear()
        with patch.object(mot, "FREE_BYTES", 10**9):
            model.generate(Request(Task.T2I, "a bird", **SMALL))
    assert not begun


def test_rope_is_traced_with_products_in_float32():
    x = mx.zeros((3, 1, 4), mx.bfloat16)
    drawn = io.StringIO()
    mx.export_to_dot(drawn, rope._product(x, x))
    # Both factors are cast, and the product back: without, the compiler does not round it.
    assert drawn.getvalue().count("AsType") >= 3


def test_rope_rounds_every_product_in_half_precision():
    def rounded(x):
        return np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32))

    rng = np.random.default_rng(0)
    first, second, cos, sin = (rounded(rng.normal(size=(300, 1, 32)).astype(np.float32)) for _ in range(4))
    expected = np.concatenate(
        [
            rounded(rounded(first * cos) - rounded(second * sin)),
            rounded(rounded(second * cos) + rounded(first * sin)),
        ],
        axis=-1,
    )
    x, cos, sin = (mx.array(y).astype(mx.bfloat16) for y in (np.concatenate([first, second], axis=-1), cos, sin))
    got = rope.Rotary()(x, rope.RotaryTable(np.zeros((3, 300), np.int32), cos, sin))
    assert np.array_equal(np.array(got.astype(mx.float32)), expected)


def request(task, image):
    visual = (Visual(str(image), VisualKind.IMAGE),)
    if task is Task.X2T_IMAGE:
        return Question(task, "what is it", visual, vit_resolution=56, max_new_tokens=4)
    return Request(task, "a bird", visuals=visual, **LOOKS) if task.takes else Request(task, "a bird", **SMALL)


def run(checkpoint, asked):
    model = load(checkpoint, FLOAT32)
    if isinstance(asked, Question):
        return np.array(model.answer(asked).tokens)
    made = model.generate(asked)
    return np.concatenate([np.array(made.latents).ravel(), made.frames.ravel() / 127.5 - 1])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.skipif(
    not shutil.which("g++"), reason="on the CPU MLX compiles with g++"))])  # fmt: skip
@pytest.mark.parametrize("task", [Task.T2I, Task.IMAGE_EDIT, Task.X2T_IMAGE])
def test_a_gpus_branches_compute_the_same(checkpoint, media, task, compiled):
    asked = request(task, media / "logo.png")
    plain = run(checkpoint, asked)
    with as_on_a_gpu(compiled):
        got = run(checkpoint, asked)
    assert got.shape == plain.shape and np.linalg.norm(got - plain) <= 1e-3 * np.linalg.norm(plain)
