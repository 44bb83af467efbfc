"""Finding and reading checkpoints: mlx-community's layout, the variants, and how little is read and held."""

import json
import os
import runpy
import tracemalloc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from safetensors import safe_open

from lance_mlx import BFLOAT16, FLOAT32, LanceError, Request, Task, Variant, ViTSource, load
from lance_mlx.checkpoint.convert import prepare
from lance_mlx.checkpoint.layouts import find_checkpoint
from lance_mlx.checkpoint.pth import read_pth
from lance_mlx.checkpoint.safetensors import TensorInfo, read_header, to_bfloat16, write_safetensors
from lance_mlx.pipeline import load as load_pipeline

make_community = runpy.run_path(str(Path(__file__).with_name("layout_cases.py")))["make_community"]
SMALL = Request(Task.T2I, "a bird", height=32, width=32, num_steps=2)


@pytest.fixture(scope="module", params=list(Variant), ids=str)
def community(request, checkpoint, tmp_path_factory) -> tuple[Variant, Path]:
    """A variant as mlx-community publishes it."""
    folder = tmp_path_factory.mktemp("community") / "Lance-bf16"
    return request.param, make_community(checkpoint, request.param, folder)


def test_the_community_layout_gives_the_official_bits(community, checkpoint):
    variant, folder = community
    theirs, ours = (load_pipeline(path, variant, BFLOAT16, looks=True) for path in (checkpoint, folder))
    for expected, found in ((theirs.model, ours.model), (theirs.vae, ours.vae)):
        found = dict(tree_flatten(found.parameters()))
        for name, array in tree_flatten(expected.parameters()):
            assert mx.array_equal(found.pop(name), array), name
        assert not found


def test_the_community_layout_converts_to_the_same_bytes(community, checkpoint, tmp_path):
    variant, folder = community
    for name, source in (("official", checkpoint), ("community", folder)):
        found = find_checkpoint(source, variant)
        prepare("it", found, tmp_path / name, "bfloat16", 10**9, ViTSource.LANCE).run(lambda *_: lambda _: None)
    official, ours = (tmp_path / name / "model-00001-of-00001.safetensors" for name in ("official", "community"))
    assert official.read_bytes() == ours.read_bytes()


def test_the_community_layout_knows_its_variant_and_its_rounding(community, tmp_path):
    variant, folder = community
    other = next(v for v in Variant if v is not variant)
    with pytest.raises(LanceError, match=f"holds {variant} and this needs {other}"):
        find_checkpoint(folder, other)
    with pytest.raises(LanceError, match="rounded to bfloat16"):
        load_pipeline(folder, variant, FLOAT32)
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LanceError, match="weights that other tools quantized are not read"):
        find_checkpoint(tmp_path, variant)


def test_a_model_for_images_makes_videos_only_when_it_is_told_to(checkpoint, tmp_path):
    folder = tmp_path / "renamed"
    folder.symlink_to(checkpoint / "Lance_3B")
    for name in ("Qwen2.5-VL-ViT", "Wan2.2_VAE.pth"):
        (tmp_path / name).symlink_to(checkpoint / name)
    request = Request(Task.T2V, "a bird", height=32, width=32, num_frames=1, num_steps=1)
    for path in (folder, checkpoint / "Lance_3B"):
        with pytest.raises(LanceError, match="or ask for variant image to use what is there all the same"):
            load(path).generate(request)
    told = load(folder, variant=Variant.IMAGE).generate(request)
    assert np.isfinite(np.array(told.latents.astype(mx.float32))).all()


def test_a_variant_is_found_whatever_state_the_other_is_in(checkpoint_copy):
    other = checkpoint_copy.path / "Lance_3B_Video"
    other.mkdir()
    (other / "llm_config.json").write_text("{")
    assert find_checkpoint(checkpoint_copy.path, Variant.IMAGE).folder == checkpoint_copy.variant


def test_a_task_that_draws_reads_neither_the_output_head_nor_the_stored_position_table(checkpoint_copy):
    path = checkpoint_copy.variant / "model.safetensors"
    name = "language_model.lm_head.weight"
    head = read_header(path)[name]
    with path.open("r+b") as file:
        file.seek(head.offset)
        file.write(np.full(head.shape, np.nan, np.float32))
    pipeline = load_pipeline(checkpoint_copy.path, Variant.IMAGE, BFLOAT16)
    latents = list(pipeline.denoise(pipeline.prepare(SMALL)))[-1].x_next
    assert mx.isfinite(latents).all()
    assert mx.isnan(pipeline.model.language_model.lm_head.weight).all()


def test_loading_holds_the_weights_and_one_tensor_more(checkpoint):
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    pipeline = load_pipeline(checkpoint, Variant.IMAGE, BFLOAT16)
    peak = mx.get_peak_memory() - before
    parameters = [*tree_flatten(pipeline.model.parameters()), *tree_flatten(pipeline.vae.parameters())]
    sizes = [array.nbytes for name, array in parameters if "lm_head" not in name]
    assert peak < 1.1 * sum(sizes) + 2 * max(sizes)


def test_a_tensor_is_read_in_blocks(tmp_path):
    path, shape = tmp_path / "a.safetensors", (4096, 4096)
    with path.open("wb") as file:
        write_safetensors(file, {"a": TensorInfo("float32", shape)}, lambda _: (np.ones(4096, "f4"),) * 4096, {})
    tensor = read_header(path)["a"]
    tracemalloc.start()
    total = sum(int(block.astype(np.int64).sum()) for block in tensor.blocks("bfloat16"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 4096**2 * 0x3F80
    assert peak < 64e6 < tensor.info.nbytes


# Every number with its upper half is between two of bfloat16's; 0x8000 is in the middle.
UPPER, LOWER = st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7F80 != 0x7F80), st.integers(0, 0xFFFF)


@given(st.lists(st.tuples(UPPER, st.sampled_from([0, 0x7FFF, 0x8000, 0x8001]) | LOWER), min_size=1))
def test_rounding_is_pytorchs(halves):
    array = np.array([upper << 16 | lower for upper, lower in halves], np.uint32).view(np.float32)
    expected = torch.from_numpy(array).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(to_bfloat16(array), expected)


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(SHAPES, st.sampled_from(["float32", "bfloat16"]))))
def test_what_is_written_is_what_safetensors_and_the_reader_read(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("written") / "a.safetensors"
    shapes.pop("__metadata__", None)
    infos = {name: TensorInfo(dtype, shape) for name, (shape, dtype) in shapes.items()}
    values = {name: torch.randn(info.shape).to(getattr(torch, info.dtype)) for name, info in infos.items()}

    def blocks(name: str):
        yield values[name].view(torch.int32 if infos[name].dtype == "float32" else torch.int16).numpy()

    with path.open("wb") as file:
        write_safetensors(file, infos, blocks, {"format": "mlx"})
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(values)
        assert all(torch.equal(file.get_tensor(name), value) for name, value in values.items())
    for name, tensor in read_header(path).items():
        assert np.array_equal(np.array(tensor.read(mx.float32)), values[name].float().numpy())


@pytest.mark.parametrize("cut", [0, 4, 40, -1])
def test_a_cut_file_is_not_readable(checkpoint_copy, cut):
    path = checkpoint_copy.path / "Qwen2.5-VL-ViT" / "vit.safetensors"
    os.truncate(path, cut if cut >= 0 else path.stat().st_size + cut)
    with pytest.raises(LanceError, match="is not a readable safetensors file"):
        read_header(path)


def test_a_state_dict_may_hold_parameters_and_views_but_not_strided_tensors(tmp_path):
    path, base = tmp_path / "a.pth", torch.arange(12.0).reshape(3, 4)
    torch.save({"part": base[1:], "own": torch.nn.Parameter(base.clone()), "half": base.half()}, path)
    found = {name: np.array(tensor.read(mx.float32)) for name, tensor in read_pth(path).items()}
    assert np.array_equal(found["part"], base[1:]) and np.array_equal(found["own"], base)
    assert np.array_equal(found["half"], base)
    torch.save({"turned": base.T}, path)
    with pytest.raises(LanceError, match="tensor 'turned' is not contiguous"):
        read_pth(path)
    torch.save({"inner": {"a": base}}, path)
    with pytest.raises(LanceError, match="does not hold a flat dict of tensors"):
        read_pth(path)
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(LanceError, match="it names torch.nn.modules.linear.Linear, which is no tensor"):
        read_pth(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(LanceError, match="is not a readable PyTorch state dict"):
        read_pth(path)
