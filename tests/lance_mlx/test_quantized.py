"""Quantized weights: what layers compute with them, recipes, conversion, and that a run has the dequantized bits."""

import json
import runpy
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from lance_mlx import BFLOAT16, FLOAT32, LanceError, Question, Request, Task, Variant, Visual, VisualKind, load
from lance_mlx.checkpoint import packing
from lance_mlx.checkpoint.convert import prepare
from lance_mlx.checkpoint.layouts import find_checkpoint
from lance_mlx.checkpoint.recipe import RECIPES, Recipe, recipe_of
from lance_mlx.checkpoint.safetensors import read_header
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.estimate.estimate import OFFICIAL, quantized_by, sizes_of, weights_of
from lance_mlx.model.layers import FusedLinear, Linear
from lance_mlx.model.quantized import MODES, QuantizedEmbedding, QuantizedLinear, Scheme, make_quantized
from lance_mlx.outputs import Generated
from lance_mlx.pipeline import load as load_pipeline

make_community = runpy.run_path(str(Path(__file__).with_name("layout_cases.py")))["make_community"]
SCHEMES = [Scheme(bits, groups, mode) for mode, (all_bits, sizes) in MODES.items() for bits in all_bits
           for groups in sizes]  # fmt: skip
DTYPES = mx.float32, mx.bfloat16
EVEN = Recipe("even", Scheme(8, 32))
LAYERS = "language_model.model.layers"
MIXED = Recipe.from_dict(
    "mixed",
    {
        f"{LAYERS}.0.*": {"bits": 6, "group_size": 32},
        f"{LAYERS}.1.mlp*": {"mode": "mxfp4"},
        f"{LAYERS}.2.self_attn.q_proj": False,
        "language_model.lm_head": {"bits": 5, "group_size": 64},
        "language_model.model.embed_tokens": {"mode": "nvfp4"},
        "vit_model.blocks.*": {"bits": 4, "group_size": 32},
        "bits": 4,
        "group_size": 32,
    },
)
DRAWN = Request(Task.T2I, "a bird", 32, 48, num_steps=2)


def both(width: int, bias: bool, scheme: Scheme, dtype: mx.Dtype, out: int = 24) -> tuple[QuantizedLinear, Linear]:
    """A quantized layer, and the one that it is when it is dequantized."""
    weight = mx.random.normal((out, width)).astype(dtype)
    packed, plain = QuantizedLinear(out, width, bias, scheme, dtype), Linear(width, out, bias)
    packed.update(scheme.quantize(weight))
    plain.weight = scheme.dequantize(packed, dtype)
    if bias:
        packed.bias = plain.bias = mx.random.normal((out,)).astype(dtype)
    return packed, plain


def convert(
    source: Path, to: Path, recipe: Recipe | None, variant=Variant.IMAGE, dtype="bfloat16", shard=10**9
) -> dict:
    """Convert; returns the report."""
    found = find_checkpoint(source, variant)
    return prepare("it", found, to, dtype, shard, ViTSource.LANCE, recipe).run(lambda *_: lambda _: None)


@pytest.fixture(scope="module")
def quantized(checkpoint, tmp_path_factory) -> Path:
    """The small image checkpoint at 8 bits in groups of 32, bfloat16."""
    folder = tmp_path_factory.mktemp("quantized") / "even"
    convert(checkpoint, folder, EVEN)
    return folder


@pytest.fixture(scope="module")
def mixed(checkpoint, tmp_path_factory) -> Path:
    """The same with a scheme for each of many parts, embeddings and head included."""
    folder = tmp_path_factory.mktemp("quantized") / "mixed"
    convert(checkpoint, folder, MIXED)
    return folder


@pytest.fixture
def question(media) -> Question:
    """About a picture."""
    image = Visual(str(media / "logo.png"), VisualKind.IMAGE)
    return Question(Task.X2T_IMAGE, "what is this?", (image,), vit_resolution=56, max_new_tokens=4)


def bits_of(made: Generated) -> bytes:
    return made.frames.tobytes() + np.array(made.latents.astype(mx.float32)).tobytes()


def values(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def spoilt(folder: Path, to: Path, **entries: object) -> Path:
    """A converted checkpoint whose config.json has other entries; None removes one."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text()) | entries
    (to / "config.json").unlink()
    (to / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return to


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_mode_and_width(scheme, dtype):
    packed, plain = both(256, True, scheme, dtype)
    x = mx.random.normal((5, 256)).astype(dtype)
    assert mx.array_equal(packed(x), plain(x))
    assert packed(x[:0]).shape == (0, 24)
    one, expected = packed(x[:1]), plain(x[:1])
    assert one.dtype == packed(x).dtype == dtype
    # The packed weight is not rounded to the dtype first.
    error = np.abs(values(one) - values(expected)).max() / values(expected).std()
    assert error < (1e-5 if dtype == mx.float32 else 0.03)
    # MLX itself, in float32.
    factors = [
        each if each.dtype == mx.uint8 else each.astype(mx.float32) for each in map(packed.get, scheme.names[1:])
    ]
    theirs = mx.dequantize(packed.weight, *factors, **scheme.to_dict(), dtype=mx.float32)
    assert mx.array_equal(plain.weight, theirs.astype(dtype))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_groups_alone_are_packed_as_in_their_matrix(scheme):
    weight = mx.random.normal((6, 256)).astype(mx.bfloat16)
    whole, groups = scheme.quantize(weight), scheme.quantize(weight.reshape(-1, scheme.group_size))
    for name, shape in scheme.shapes(6, 256).items():
        assert whole[name].shape == shape
        assert mx.array_equal(groups[name].reshape(shape), whole[name])


def test_embeddings_are_dequantized_where_they_are_looked_up():
    scheme, table = Scheme(5, 32), mx.random.normal((7, 64)).astype(mx.bfloat16)
    embedding = QuantizedEmbedding(7, 64, scheme, mx.bfloat16)
    embedding.update(scheme.quantize(table))
    ids = mx.array([[3, 0], [6, 3]])
    found = embedding(ids)
    assert found.dtype == mx.bfloat16
    assert mx.array_equal(found, scheme.dequantize(embedding, mx.bfloat16)[ids])


@pytest.mark.parametrize("dtype", DTYPES)
def test_those_quantized_alike_are_one_product(dtype):
    alike = [both(64, True, Scheme(8, 32), dtype, out)[0] for out in (8, 24)]
    x = mx.random.normal((2, 64)).astype(dtype)
    apart = [[each(rows) for each in alike] for rows in (x[:1], x)]
    mx.eval(apart)
    joined, called = FusedLinear(alike), []
    for rows, expected in zip((x[:1], x), apart, strict=True):
        assert all(map(mx.array_equal, joined(rows), expected))
    product = QuantizedLinear.product
    QuantizedLinear.product = lambda self, *given: called.append(1) or product(self, *given)
    try:
        joined(x[:1])
        other = both(64, True, Scheme(4, 32), dtype, 8)[0]
        FusedLinear([alike[0], other])(x[:1])
        FusedLinear([both(64, True, Scheme(4, 32), dtype)[1], other])(x[:1])
    finally:
        QuantizedLinear.product = product
    assert len(called) == 1 + 2 + 1


def test_contradictions_are_refused():
    for given, line in (
        ({"bits": 7}, "bits 7 does not go with mode affine: it has 3 or 4 or 5 or 6 or 8"),
        ({"bits": 8, "mode": "mxfp4"}, "bits 8 does not go with mode mxfp4: it has 4"),
        ({"group_size": 64, "mode": "nvfp4"}, "group_size 64 does not go with mode nvfp4: it has 16"),
        ({"mode": "int8"}, "there is no mode 'int8'"),
    ):
        with pytest.raises(LanceError, match=line):
            Scheme.of(**given)
    assert Scheme.of(mode="nvfp4") == Scheme(4, 16, "nvfp4")
    with pytest.raises(LanceError, match="says bits, groups and mode itself"):
        recipe_of(4, "small")
    with pytest.raises(LanceError, match="there is no recipe 'tiny': give 8bit, small, or a JSON file"):
        recipe_of(predicate="tiny")


def test_the_default_takes_both_towers_attention_and_mlp():
    path = f"{LAYERS}.35.%s"
    both_towers = [f"{kind}{tower}" for kind in ("self_attn.v_proj", "mlp%s.up_proj") for tower in ("", "_moe_gen")]
    both_towers = [path % name.replace("%s_moe_gen", "_moe_gen.", 1) for name in both_towers if "%s" not in name]
    both_towers += [path % "mlp.up_proj", path % "mlp_moe_gen.up_proj"]
    assert {RECIPES["8bit"].at(each) for each in both_towers} == {Scheme(8, 64)}
    others = "language_model.lm_head language_model.model.embed_tokens vae2llm llm2vae time_embedder.mlp.0".split()
    for each in (*others, "vit_model.blocks.0.mlp.up_proj", "vit_model.blocks.0.attn.proj"):
        assert RECIPES["8bit"].at(each) is None, each
    small = RECIPES["small"].at
    assert small(path % "mlp_moe_gen.gate_proj").bits == 4
    assert small(path % "mlp.down_proj").bits == small(path % "self_attn.q_proj_moe_gen").bits == 8
    assert small("vit_model.blocks.0.mlp.gate_proj") is None


def test_the_first_pattern_decides():
    recipe = Recipe.from_dict("it", {"bits": 4, f"{LAYERS}.0.*": {"bits": 8}, f"{LAYERS}.*.q_proj": False})
    assert recipe.at(f"{LAYERS}.0.self_attn.q_proj") == Scheme(8, 64)
    assert recipe.at(f"{LAYERS}.1.self_attn.q_proj") is None
    assert recipe.at(f"{LAYERS}.1.self_attn.k_proj") == Scheme(4, 64)


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ("{", "is not readable JSON"),
        ("[]", "must hold a JSON object"),
        ('{"*.q_proj": 8}', r"'\*.q_proj' must be true, false, or an object of bits, group_size and mode"),
        ('{"bits": 9}', "bits 9 does not go with mode affine"),
        ('{"*.q_prj": {"bits": 4}}', r"'\*.q_prj' matches no module of this checkpoint"),
        ('{"*norm*": {"bits": 4}}', "matches '.*norm.*', which is neither a linear layer nor an embedding"),
        ('{"vit_model.patch_embed.proj": true}', "which is neither a linear layer nor an embedding"),
        ('{"*": false}', "quantizes nothing"),
        ('{"group_size": 128}', "quantizes nothing: the rows of .* do not part into groups"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(checkpoint, tmp_path, recipe, line):
    path = tmp_path / "recipe.json"
    path.write_text(recipe)
    with pytest.raises(LanceError, match=line):
        convert(checkpoint, tmp_path / "out", recipe_of(predicate=str(path)))
    assert not (tmp_path / "out").exists()


def test_what_is_written(checkpoint, quantized, tmp_path):
    config, report = (json.loads((quantized / f"{name}.json").read_text()) for name in ("config", "conversion_report"))
    assert config["quantization"] == {"bits": 8, "group_size": 32, "mode": "affine"}
    entry = report["tensors"][f"{LAYERS}.0.mlp.up_proj.weight"]
    assert (entry["source"]["shape"], entry["converted"]["shape"]) == ([96, 64], [96, 16])
    assert (entry["converted"]["bits"], entry["converted"]["dtype"]) == (8, "uint32")
    assert report["recipe"] == "even"
    index = json.loads((quantized / "model.safetensors.index.json").read_text())
    tensors = read_header(quantized / "model-00001-of-00001.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.info.nbytes for tensor in tensors.values())
    assert "Quantized are 42 weights: 42 at affine 8 bits in groups of 32" in (quantized / "README.md").read_text()
    # Rows of 96 weights do not part into groups of 64.
    left = convert(checkpoint, tmp_path / "out", recipe_of(4))["not_in_groups"]
    assert left == [f"{LAYERS}.{index}.mlp{tower}.down_proj" for index in range(3) for tower in ("", "_moe_gen")]


def test_blocks_give_the_bytes_of_the_whole(checkpoint, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr("lance_mlx.checkpoint.safetensors._BLOCK", 128)
    monkeypatch.setattr(packing, "_WORDS", 64)
    convert(checkpoint, tmp_path / "blocks", MIXED)
    name = "model-00001-of-00001.safetensors"
    assert (tmp_path / "blocks" / name).read_bytes() == (mixed / name).read_bytes()
    convert(mixed, tmp_path / "small_blocks", None)
    monkeypatch.undo()
    convert(mixed, tmp_path / "large_blocks", None)
    assert (tmp_path / "small_blocks" / name).read_bytes() == (tmp_path / "large_blocks" / name).read_bytes()


@pytest.mark.parametrize("name", ["quantized", "mixed"])
def test_what_is_drawn_is_what_the_dequantized_checkpoint_draws(request, tmp_path, question, name):
    folder = request.getfixturevalue(name)
    convert(folder, tmp_path / "dequantized", None)
    assert "quantization" not in json.loads((tmp_path / "dequantized" / "config.json").read_text())
    packed, plain = load(folder), load(tmp_path / "dequantized")
    assert bits_of(packed.generate(DRAWN)) == bits_of(plain.generate(DRAWN))
    first, second = (model.pipeline(Variant.IMAGE, True).model for model in (packed, plain))
    ids = mx.array([3, 5])
    assert mx.array_equal(*(each.language_model.model.embed_tokens(ids) for each in (first, second)))
    # Rows of an answer are multiplied one by one with what is packed.
    assert packed.answer(question).tokens == plain.answer(question).tokens


@pytest.mark.parametrize("name", ["quantized", "mixed"])
def test_quantizing_on_the_way_in_and_low_ram_give_the_same_bits(request, checkpoint, question, name):
    folder, recipe = request.getfixturevalue(name), {"quantized": EVEN, "mixed": MIXED}[name]
    models = load(folder), load(checkpoint, quantize=recipe), load(folder, low_ram=True)
    assert len({bits_of(model.generate(DRAWN)) for model in models}) == 1
    assert len({model.answer(question).tokens for model in models}) == 1
    assert models[1].generate(DRAWN).metadata["quantize"] == name.replace("quantized", "even")
    with pytest.raises(LanceError, match="low_ram would quantize every layer anew"):
        load(checkpoint, quantize=8, low_ram=True)
    with pytest.raises(LanceError, match="is quantized already"):
        load_pipeline(folder, Variant.IMAGE, recipe=EVEN)


def test_no_dtype_comes_from_a_packed_weight(checkpoint, tmp_path, media):
    everything = Recipe.from_dict("all", {"bits": 8, "group_size": 32, "*": True})
    convert(checkpoint, tmp_path / "out", everything, dtype="float32")
    image = Visual(str(media / "logo.png"), VisualKind.IMAGE)
    edit = Request(Task.IMAGE_EDIT, "make it blue", visuals=(image,), vae_resolution=64, vit_resolution=56, num_steps=1)
    for numerics in (FLOAT32, BFLOAT16):
        pipeline = load_pipeline(tmp_path / "out", Variant.IMAGE, numerics, looks=True)
        for module in (pipeline.model.language_model.lm_head, pipeline.model.language_model.model.embed_tokens):
            assert module.weight.dtype == mx.uint32
            assert module.scales.dtype == mx.float32
        for request in (DRAWN, edit):
            prepared = pipeline.prepare(request)
            step = list(pipeline.denoise(prepared))[0]
            assert {step.velocity.dtype, step.x_next.dtype} == {numerics.dtype}
            clean = (*prepared.conditions.vit, *prepared.conditions.clean)
            assert {each.dtype for each in clean} <= {numerics.dtype}


def test_a_conversion_that_was_stopped_goes_on(checkpoint, tmp_path, quantized):
    def stop_after(limit: int):
        def started(total: int, done: int):
            def progress(count: int) -> None:
                nonlocal limit
                limit -= count
                if limit < 0:
                    raise KeyboardInterrupt

            return progress

        return started

    def conversion(recipe: Recipe):
        found = find_checkpoint(checkpoint, Variant.IMAGE)
        return prepare("it", found, tmp_path / "out", "bfloat16", 100_000, ViTSource.LANCE, recipe)

    with pytest.raises(KeyboardInterrupt):
        conversion(EVEN).run(stop_after(800_000))
    finished = sorted(path.name for path in conversion(EVEN).staging.glob("*.safetensors"))
    assert finished
    kept = []
    conversion(EVEN).run(lambda total, done: kept.append(done) or (lambda count: None))
    assert kept[0] > 0
    whole = mx.load(str(quantized / "model-00001-of-00001.safetensors"))
    for path in (tmp_path / "out").glob("*.safetensors"):
        for name, array in mx.load(str(path)).items():
            assert mx.array_equal(array, whole[name]), name
    (tmp_path / "out").rename(tmp_path / "first")
    with pytest.raises(KeyboardInterrupt):
        conversion(EVEN).run(stop_after(800_000))
    # Another recipe begins anew.
    conversion(recipe_of(6)).run(lambda total, done: kept.append(done) or (lambda count: None))
    assert kept[1] == 0


def test_what_config_json_says_must_fit_the_file(quantized, tmp_path):
    said = {"bits": 8, "group_size": 32, "mode": "affine"}
    path = f"{LAYERS}.0.mlp.up_proj"
    for number, (entries, line) in enumerate([
        ({"quantization": None}, "is quantized, but config.json has no 'quantization'"),
        ({"quantization": said | {path: False}}, f"'{path}.weight' is quantized, but config.json says that it is not"),
        ({"quantization": said | {"bits": 4}}, r"has shape \[.*\], expected \[.*\]: config.json's quantization says"),
        ({"quantization": said | {path: {"mode": "mxfp8"}}}, f"unexpected tensor '{path}.biases'"),
        ({"quantization": said | {"bits": 7}}, "quantization: bits 7 does not go with mode affine"),
        ({"quantization_config": said | {"bits": 4}}, "quantization and quantization_config contradict each other"),
        ({"quantization": {"quant_method": "awq"}}, "weights that other tools quantized are not read"),
    ]):  # fmt: skip
        with pytest.raises(LanceError, match=line):
            load(spoilt(quantized, tmp_path / str(number), **entries)).pipeline(Variant.IMAGE, False)
    both_written = spoilt(quantized, tmp_path / "both", quantization_config=said)
    load(both_written).pipeline(Variant.IMAGE, False)


def test_integers_where_a_number_belongs_are_refused(checkpoint_copy):
    checkpoint_copy.edit_weights(language_model__model__norm__weight=mx.zeros(64, mx.uint8))
    with pytest.raises(LanceError, match="norm.weight' is uint8; float32, bfloat16 or float16 is expected"):
        load(checkpoint_copy.path).pipeline(Variant.IMAGE, False)


def test_the_community_names_packed_tensors_as_mlx_does(checkpoint, tmp_path, question):
    folder = make_community(checkpoint, Variant.IMAGE, tmp_path / "community")
    path = folder / "model.safetensors"
    tensors, scheme = mx.load(str(path)), Scheme(4, 32)
    mx.eval(tensors)
    for name in list(tensors):
        if "_proj" in name and name.startswith("layers") and name.endswith(".weight"):
            packed = (Scheme(8, 32) if "down_proj" in name else scheme).quantize(tensors.pop(name))
            tensors |= {name.replace("weight", kind): array for kind, array in packed.items()}
    mx.save_safetensors(str(path), tensors)
    config = json.loads((folder / "config.json").read_text())
    said = {"group_size": 32, "bits": 4}
    said |= {f"layers.{layer}.mlp{tower}.down_proj": {"group_size": 32, "bits": 8}
             for layer in range(3) for tower in ("", "_moe_gen")}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | {"quantization": said, "quantization_config": said}))
    recipe = Recipe.from_dict("it", {"group_size": 32, "bits": 4, "*.layers.*.down_proj": {"bits": 8}})
    theirs, ours = load(folder), load(checkpoint, quantize=recipe)
    assert bits_of(theirs.generate(DRAWN)) == bits_of(ours.generate(DRAWN))
    assert theirs.answer(question).tokens == ours.answer(question).tokens


def test_modules_are_put_in_place_of_linears_alone():
    model = nn.Module()
    model.layers = [Linear(64, 8), Linear(64, 4, False)]
    make_quantized(model, {"layers.1": Scheme(8, 32)}, mx.bfloat16)
    assert [type(layer) for layer in model.layers] == [Linear, QuantizedLinear]
    assert "bias" not in model.layers[1]


def test_from_the_command_line(checkpoint, tmp_path, invoke, refused, media):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"bits": 6, "group_size": 32, f"{LAYERS}.0.*": {"bits": 8}}))
    given = ["--variant", "image", "-q", "--quant-predicate", recipe]
    done = invoke("convert", checkpoint, tmp_path / "out", *given)
    assert "bfloat16, 42 weights quantized," in done.stdout
    drawing = ["--prompt", "a bird", "--width", 32, "--height", 32, "--steps", 1, "-Q", "--model"]
    invoke("generate", "t2i", *drawing, tmp_path / "out", "-o", tmp_path / "a.png")
    loading = [*drawing, checkpoint, "--quant-predicate", recipe]
    invoke("generate", "t2i", *loading, "-o", tmp_path / "b.png")
    invoke(
        "generate", "t2i", "--model", checkpoint, "--config-from", tmp_path / "b.png", "-o", tmp_path / "c.png", "-Q"
    )
    pictures = [mx.array(np.frombuffer((tmp_path / f"{name}.png").read_bytes(), np.uint8)) for name in "bc"]
    assert mx.array_equal(*pictures)
    shown = invoke("info", "--model", tmp_path / "out").stdout
    assert "bfloat16 and uint32, 14 weights affine 8 bits in groups of 32, 28 weights affine 6 bits" in shown
    assert "--q-mode" in refused("convert", checkpoint, tmp_path / "no", "--q-bits", 4)
    line = refused(
        "convert", checkpoint, tmp_path / "no", "--variant", "image", "-q", "--q-mode", "mxfp4", "--q-bits", 8
    )
    assert "bits 8 does not go with mode mxfp4" in line
    assert "is quantized already" in refused("convert", tmp_path / "out", tmp_path / "no", "-q")
    assert "leave those options out" in refused("generate", "t2i", *loading, "-q", 8)
    assert "--low-ram" in refused("generate", "t2i", *drawing, checkpoint, "-q", 8, "--low-ram")
    assert not (tmp_path / "no").exists()


def test_the_estimate_counts_packed_bytes(checkpoint, quantized, invoke):
    told = json.loads(invoke("info", "--model", quantized, "--task", "x2t_image", "--json").stdout)["estimate"]
    tensors = read_header(quantized / "model-00001-of-00001.safetensors")
    layers = sum(tensor.info.nbytes for name, tensor in tensors.items() if name.startswith(LAYERS))
    assert told["weights"]["layers"] == layers
    found = find_checkpoint(checkpoint, Variant.IMAGE)
    assert weights_of(sizes_of(found, True, recipe=EVEN), BFLOAT16).layers == layers
    even, small = (weights_of(quantized_by(RECIPES[name], OFFICIAL), BFLOAT16) for name in ("8bit", "small"))
    assert small.layers < 0.75 * even.layers < 0.4 * weights_of(OFFICIAL, BFLOAT16).layers
    assert small[2:] == even[2:] == weights_of(OFFICIAL, BFLOAT16)[2:]
