"""Weights that are read while they are used: the same results bit for bit, in memory that does not grow with layers."""

import gc
import runpy
import tracemalloc
import weakref
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from lance_mlx import BFLOAT16, FLOAT32, LanceError, Question, Request, Task, Variant, Visual, VisualKind, load
from lance_mlx.backend.numerics import runs_on_cpu
from lance_mlx.checkpoint.convert import prepare
from lance_mlx.checkpoint.layouts import find_checkpoint
from lance_mlx.checkpoint.safetensors import read_header
from lance_mlx.checkpoint.streaming import StreamedLayers
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.model.mot import ArmInput, ExpertRows, LayerInput
from lance_mlx.model.rope import rotary_table
from lance_mlx.pipeline import load as load_pipeline
from lance_mlx.sampling import flow

ROOT = Path(__file__).parents[2]
make_community = runpy.run_path(str(Path(__file__).with_name("layout_cases.py")))["make_community"]
SMALL = {"vae_resolution": 64, "vit_resolution": 56, "num_steps": 2}
LAYER = "language_model.model.layers.1.mlp_moe_gen.up_proj.weight"


@pytest.fixture
def image(media) -> Visual:
    """A transparent PNG."""
    return Visual(str(media / "logo.png"), VisualKind.IMAGE)


def asking(image: Visual, question: str = "what is this?") -> Question:
    return Question(Task.X2T_IMAGE, question, (image,), vit_resolution=56, max_new_tokens=6)


def drawn(model, image: Visual | None = None) -> bytes:
    """The bytes of what a model draws, or of an edit and of an edit of that."""
    if image is None:
        made = model.generate(Request(Task.T2I, "a bird", 32, 48, num_steps=3))
    else:
        made = model.generate(Request(Task.IMAGE_EDIT, "make it blue", visuals=(image,), **SMALL))
        made = model.edit_again(made, "add a hat")
    return made.frames.tobytes() + np.array(made.latents.astype(mx.float32)).tobytes()


@pytest.mark.parametrize("numerics", [BFLOAT16, FLOAT32], ids=lambda numerics: numerics.name)
def test_results_are_the_same_bit_for_bit(checkpoint, image, numerics):
    kept, streamed = (load(checkpoint, numerics, low_ram=low_ram) for low_ram in (False, True))
    assert drawn(kept) == drawn(streamed)
    assert drawn(kept, image) == drawn(streamed, image)
    questions = [asking(image), asking(image, "and this?")]
    expected, found = (list(model.answer_all(questions)) for model in (kept, streamed))
    assert [answer.tokens for answer in expected] == [answer.tokens for answer in found]


@pytest.mark.parametrize("layout", ["official", "converted", "community"])
def test_every_layout_streams(checkpoint, tmp_path, image, layout):
    folder = tmp_path / "model"
    if layout == "official":
        folder = checkpoint
    elif layout == "converted":
        found = find_checkpoint(checkpoint, Variant.IMAGE)
        prepare("it", found, folder, "bfloat16", 200_000, ViTSource.LANCE).run(lambda *_: lambda _: None)
    else:
        make_community(checkpoint, Variant.IMAGE, folder)
    assert drawn(load(folder, low_ram=True), image) == drawn(load(checkpoint), image)


def test_nothing_that_streams_stays_in_memory(checkpoint, image):
    gc.collect()
    # What other tests keep.
    before = mx.get_active_memory()
    model = load(checkpoint, FLOAT32, low_ram=True)
    drawn(model, image)
    gc.collect()
    tensors = read_header(checkpoint / "Lance_3B" / "model.safetensors")
    streamed = sum(tensor.info.nbytes for name, tensor in tensors.items() if ".layers." in name)
    others = sum(tensor.info.nbytes for name, tensor in tensors.items() if ".layers." not in name)
    assert mx.get_active_memory() - before < others + streamed / 4


def peak(folder: Path, low_ram: bool) -> tuple[int, int]:
    """Peak bytes of MLX's arrays, and of the rest that Python and NumPy allocate, in loading a model and drawing."""
    gc.collect()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    tracemalloc.start()
    load(folder, FLOAT32, low_ram=low_ram).generate(Request(Task.T2I, "a bird", 16, 16, num_steps=2))
    others = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return mx.get_peak_memory() - before, others


@pytest.mark.skipif(not runs_on_cpu(), reason="its bound is less than what a GPU holds of work that is under way")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    make = runpy.run_path(str(ROOT / "scripts" / "make_checkpoint.py"))["main"]
    sizes = ["--hidden", "128", "--intermediate", "2048", "--vit-layers", "1", "--variant", "image"]
    peaks = {}
    for layers in (2, 6):
        folder = tmp_path / str(layers)
        assert make([str(folder), "--layers", str(layers), *sizes]) == 0
        peaks[layers] = peak(folder, low_ram=True)
    tensors = read_header(tmp_path / "6" / "Lance_3B" / "model.safetensors")
    layer = sum(tensor.info.nbytes for name, tensor in tensors.items() if ".layers.0." in name)
    for two, six in zip(peaks[2], peaks[6], strict=True):
        assert six - two < layer / 10
    # The measure sees layers where they stay.
    assert peak(tmp_path / "6", low_ram=False)[0] - peaks[6][0] > 4 * layer


def test_a_pass_of_text_reads_one_expert_and_a_broken_pass_leaves_no_trace(checkpoint, monkeypatch):
    read, original = [], StreamedLayers._read
    monkeypatch.setattr(StreamedLayers, "_read", lambda self, *key: (read.append(key), original(self, *key))[1])
    pipeline = load_pipeline(checkpoint, Variant.IMAGE, FLOAT32, low_ram=True)
    config, model = pipeline.model.config, pipeline.model.language_model.model
    rotary = rotary_table(np.zeros((3, 2), np.int32), config, FLOAT32)
    text = ExpertRows(mx.ones((2, config.hidden_size)), None)
    model.layers[0](text, [LayerInput(rotary, None)], True, False)
    expected = model(text, [ArmInput(rotary, ())], causal=True, qk_float32=False)[0].und
    kept = load_pipeline(checkpoint, Variant.IMAGE, FLOAT32).model.language_model.model
    assert mx.array_equal(kept(text, [ArmInput(rotary, ())], causal=True, qk_float32=False)[0].und, expected)
    assert set(read) == {(0, False), (1, False), (2, False)}
    gen = next(name for name in model.layers._tensors[0] if "_moe_gen" in name)
    assert gen not in {name for name, *_ in original(model.layers, 0, False)}
    assert gen in {name for name, *_ in original(model.layers, 0, True)}


def test_from_the_command_line_nothing_but_the_time_differs(run, refused, tmp_path, checkpoint, media):
    given = ["generate", "image_edit", "--model", checkpoint, "--image", media / "logo.png", "--prompt", "blue"]
    given += ["--vae-resolution", 64, "--vit-resolution", 56, "--steps", 2, "-Q"]
    for name, arguments in {"kept": [], "streamed": ["--low-ram"]}.items():
        done = run(*given, *arguments, "-o", tmp_path / f"{name}.png")
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "kept.png").read_bytes() == (tmp_path / "streamed.png").read_bytes()


def test_a_wrong_file_is_one_line_before_any_work(refused, checkpoint_copy, tmp_path):
    weights, vae = checkpoint_copy.variant / "model.safetensors", checkpoint_copy.path / "Wan2.2_VAE.pth"
    given = ["generate", "t2i", "--low-ram", "--prompt", "a", "-Q", "--model", checkpoint_copy.path]
    given += ["-o", tmp_path / "a.png", "--steps", 1, "--width", 32, "--height", 32]
    for path in (weights, vae):
        whole = path.read_bytes()
        path.write_bytes(whole[:-100])
        assert str(path) in refused(*given)
        path.write_bytes(whole)
    checkpoint_copy.edit_weights(**{LAYER: None})
    assert f"tensor '{LAYER}' is missing" in refused(*given)
    checkpoint_copy.edit_weights(**{LAYER: mx.full((96, 64), float("nan"))})
    assert f"tensor '{LAYER}' holds NaN" in refused(*given)
    assert not (tmp_path / "a.png").exists()


def test_a_file_that_is_cut_off_while_it_streams_is_one_line(checkpoint_copy):
    pipeline = load_pipeline(checkpoint_copy.path, Variant.IMAGE, FLOAT32, low_ram=True)
    path = checkpoint_copy.variant / "model.safetensors"
    path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(LanceError, match="ends inside tensor"):
        list(pipeline.denoise(pipeline.prepare(Request(Task.T2I, "a bird", 32, 32, num_steps=1))))


def test_encoders_make_room_where_they_are_not_kept(checkpoint, image):
    once, kept = load(checkpoint, FLOAT32, keep_encoders=False), load(checkpoint, FLOAT32)
    held = []
    request = Request(Task.IMAGE_EDIT, "make it blue", visuals=(image,), **SMALL)

    def watch(step):
        held.append("vit_model" in once._pipeline.model or "encoder" in once._pipeline.vae)

    latents = once.generate(request, watch).latents
    assert mx.array_equal(latents, kept.generate(request).latents)
    assert held == [False, False]
    # Another look loads the model again.
    assert once.answer(asking(image)).tokens == kept.answer(asking(image)).tokens
    assert "vit_model" not in once._pipeline.model and "vit_model" in kept._pipeline.model
    drawn(once)


def test_the_cache_of_the_unconditional_arm_goes_when_guidance_ends(pipeline, monkeypatch):
    made, original = [], flow.make_arms

    def make(*given):
        arms = original(*given)
        made.append(weakref.ref(arms["uncond"]))
        return arms

    monkeypatch.setattr(flow, "make_arms", make)
    request = Request(Task.T2V, "a bird", 32, 32, 5, num_steps=8)
    held = []
    for step in pipeline.denoise(pipeline.prepare(request)):
        held.append((step.velocity_uncond is not None, made[0]() is not None))
    assert held == [(True, True)] * 7 + [(False, False)]
