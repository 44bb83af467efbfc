"""Scales that move into the weights behind a norm or up_proj: nothing changes but what is quantized."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from lance_mlx import LanceError, Question, Request, Task, Variant, Visual, VisualKind, load
from lance_mlx.backend.numerics import policy
from lance_mlx.checkpoint.convert import prepare
from lance_mlx.checkpoint.folding import FOLLOWERS, fold, followers
from lance_mlx.checkpoint.layouts import find_checkpoint
from lance_mlx.checkpoint.recipe import Recipe
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.model.quantized import Scheme

LAYERS = "language_model.model.layers"
SOURCES = [f"{LAYERS}.{layer}.{name}" for layer in range(3) for name in FOLLOWERS]
DRAWN = Request(Task.T2I, "a bird", 32, 48, num_steps=2)


@pytest.fixture(scope="module")
def scales(checkpoint, tmp_path_factory) -> Path:
    """Scales of every source of the small checkpoint."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("scales") / "scales.safetensors"
    tensors = find_checkpoint(checkpoint, Variant.IMAGE).lance().tensors
    save_file(
        {s: np.exp2(rng.integers(-5, 6, tensors[f"{s}.weight"].shape[0])).astype(np.float32) for s in SOURCES}, path
    )
    return path


def recipe_at(folder: Path, **values: object) -> Recipe:
    path = folder / f"{len(list(folder.glob('*.json')))}.json"
    path.write_text(json.dumps(values))
    return Recipe.from_file(path)


@pytest.mark.parametrize("numerics", ["float32", "bfloat16"])
def test_what_is_not_quantized_computes_the_same_bits(checkpoint, scales, tmp_path, media, numerics):
    """One matrix outside of the layers is quantized, so that there is a recipe."""
    values = {"llm2vae": {"bits": 8, "group_size": 32}, "*": False}
    image = Visual(str(media / "logo.png"), VisualKind.IMAGE)
    question = Question(Task.X2T_IMAGE, "what is this?", (image,), vit_resolution=56, max_new_tokens=4)
    edit = Request(Task.IMAGE_EDIT, "make it blue", visuals=(image,), vae_resolution=64, vit_resolution=56, num_steps=2)
    plain, moved = (
        load(checkpoint, numerics=policy(numerics), quantize=recipe_at(tmp_path, **values, **more))
        for more in ({}, {"scales": str(scales)})
    )
    for request in (DRAWN, edit):
        latents = [np.array(model.generate(request).latents.astype(mx.float32)) for model in (plain, moved)]
        assert np.array_equal(*latents)
    assert plain.answer(question).tokens == moved.answer(question).tokens
    norms = [model.pipeline(Variant.IMAGE, True).model.language_model.model.layers[1] for model in (plain, moved)]
    assert not mx.array_equal(*(each.input_layernorm_moe_gen.weight for each in norms))


def test_weights_are_quantized_behind_their_scales(checkpoint, scales, tmp_path):
    recipe = recipe_at(tmp_path, bits=4, group_size=32, scales=str(scales))
    convert = prepare("it", find_checkpoint(checkpoint, Variant.IMAGE), tmp_path / "out", "bfloat16", 10**9,
                      ViTSource.LANCE, recipe)  # fmt: skip
    report = convert.run(lambda *_: lambda _: None)
    assert report["scales"] == str(scales)
    written = mx.load(str(next((tmp_path / "out").glob("*.safetensors"))))
    source = mx.load(str(checkpoint / "Lance_3B" / "model.safetensors"))
    held = mx.load(str(scales))
    up = f"{LAYERS}.1.mlp_moe_gen.up_proj"
    before = source[f"{up}.weight"].astype(mx.bfloat16).astype(mx.float32)
    moved = before / held[up][:, None] * held[f"{LAYERS}.1.post_attention_layernorm_moe_gen"]
    for name, array in Scheme(4, 32).quantize(moved.astype(mx.bfloat16)).items():
        assert mx.array_equal(written[f"{up}.{name}"], array)
    assert "scales" not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    drawn = [
        model.generate(DRAWN).frames.tobytes() for model in (load(tmp_path / "out"), load(checkpoint, quantize=recipe))
    ]
    assert drawn[0] == drawn[1]


def test_blocks_are_whole_rows(checkpoint, scales, monkeypatch):
    tensors = find_checkpoint(checkpoint, Variant.IMAGE).lance().tensors
    moved = fold(tensors, scales)
    assert moved.keys() == tensors.keys()
    for name in (f"{LAYERS}.0.mlp.up_proj.weight", f"{LAYERS}.2.input_layernorm.weight"):
        for dtype in ("float32", "bfloat16"):
            parts = list(moved[name].blocks(dtype, size=100))
            assert len(parts) > (name.endswith("up_proj.weight"))
            assert np.array_equal(np.concatenate(parts), moved[name].values(dtype))
    assert moved["vae2llm.weight"] is tensors["vae2llm.weight"]


def test_sources_have_followers():
    assert followers(f"{LAYERS}.7.input_layernorm_moe_gen") == tuple(
        f"{LAYERS}.7.self_attn.{kind}_proj_moe_gen" for kind in "qkv"
    )
    assert followers(f"{LAYERS}.7.mlp_moe_gen.up_proj") == (f"{LAYERS}.7.mlp_moe_gen.down_proj",)
    for other in ("self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj", "input_layernorm.weight"):
        assert followers(f"{LAYERS}.7.{other}") == ()
    assert followers("language_model.model.norm") == ()


@pytest.mark.parametrize(
    ("held", "line"),
    [
        ({f"{LAYERS}.0.mlp.gate_proj": np.ones(96)}, "gate_proj' is no module of this checkpoint whose scales"),
        ({f"{LAYERS}.9.mlp.up_proj": np.ones(96)}, "'.*9.mlp.up_proj' is no module"),
        ({f"{LAYERS}.0.mlp.up_proj": np.ones(95)}, r"has shape \[95\], expected \[96\]"),
        ({f"{LAYERS}.0.mlp.up_proj": np.full(96, 3)}, "must hold powers of two"),
        ({f"{LAYERS}.0.mlp.up_proj": np.full(96, -2)}, "must hold powers of two"),
        ({f"{LAYERS}.0.mlp.up_proj": np.full(96, 2.0**40)}, "must hold powers of two, between"),
        (None, "scales.safetensors is missing"),
    ],
)
def test_scales_that_cannot_be_moved_are_refused(checkpoint, tmp_path, held, line):
    path = tmp_path / "scales.safetensors"
    if held is not None:
        save_file({name: array.astype(np.float32) for name, array in held.items()}, path)
    with pytest.raises(LanceError, match=line):
        load(checkpoint, quantize=recipe_at(tmp_path, group_size=32, scales=path.name)).pipeline(Variant.IMAGE, False)


def test_scales_are_a_name(tmp_path):
    with pytest.raises(LanceError, match="'scales' must be the name of a safetensors file"):
        recipe_at(tmp_path, scales=2)
    with pytest.raises(LanceError, match="'scales' must be true, false"):
        Recipe.from_dict("it", {"scales": "a"})


def test_other_scales_are_another_conversion(checkpoint, scales, tmp_path, monkeypatch):
    """What was staged with other scales is not gone on with."""
    own = tmp_path / "scales.safetensors"
    own.write_bytes(scales.read_bytes())
    recipe = recipe_at(tmp_path, bits=4, group_size=32, scales=own.name)
    plans = []
    for _ in range(2):
        convert = prepare("it", find_checkpoint(checkpoint, Variant.IMAGE), tmp_path / "out", "bfloat16", 10**9,
                          ViTSource.LANCE, recipe)  # fmt: skip
        plans.append(convert._plan(convert._inspect()[0]))
        save_file({f"{LAYERS}.0.mlp.up_proj": np.full(96, 2, np.float32)}, own)
    assert plans[0] != plans[1]
