"""Adapters: in use on every kind of base, their folders in both forms, fused into weights, and on the command line."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.tuner.lora
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lance_mlx import BFLOAT16, FLOAT32, Request, Variant
from lance_mlx import load as open_checkpoint
from lance_mlx.errors import LanceError
from lance_mlx.media.write import read_metadata
from lance_mlx.model.layers import Linear
from lance_mlx.pipeline import load
from lance_mlx.training.adapter_files import read_adapter, write_adapter
from lance_mlx.training.lora import Adapter, LoRASettings, Pair, adaptable, add_adapters, new_pairs, pairs_of

Q, UP = "language_model.model.layers.1.self_attn.q_proj_moe_gen", "language_model.model.layers.0.mlp.up_proj"


def drawn(pipeline, rank: int = 4, seed: int = 0, **settings) -> dict[str, Pair]:
    """Adapters that change something."""
    pairs = new_pairs(pipeline.model, LoRASettings(rank, 2.0 * rank, **settings), mx.random.key(seed))
    keys = mx.random.split(mx.random.key(seed + 100), len(pairs))
    return {
        path: pair._replace(b=0.1 * mx.random.normal(pair.b.shape, key=key))
        for (path, pair), key in zip(pairs.items(), keys, strict=True)
    }


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters") / "both"
    write_adapter(path, drawn(pipeline, tower="both"))
    return path


@pytest.fixture(scope="module")
def peft_folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters") / "peft"
    write_adapter(path, drawn(pipeline, seed=1), peft=True)
    return path


def test_a_layer_gives_what_mlx_lms_does():
    layer, x = Linear(8, 6), mx.random.normal((5, 8), key=mx.random.key(0))
    theirs = mlx_lm.tuner.lora.LoRALinear(8, 6, r=3, scale=2.5)
    theirs.linear = nn.Linear(8, 6)
    theirs.linear.weight, theirs.linear.bias = layer.weight, layer.bias
    theirs.lora_b = mx.random.normal((3, 6), key=mx.random.key(1))
    plain = layer(x)
    layer.lora_a, layer.lora_b, layer.lora_scale = theirs.lora_a, theirs.lora_b, theirs.scale
    np.testing.assert_allclose(np.array(layer(x)), np.array(theirs(x)), rtol=1e-5, atol=1e-5)
    assert np.abs(np.array(layer(x) - plain)).max() > 0.1


def test_targets_are_chosen_by_tower_and_pattern(pipeline):
    def chosen(**settings):
        return set(new_pairs(pipeline.model, LoRASettings(2, **settings), mx.random.key(0)))

    generation, understanding, both = (chosen(tower=name) for name in ("generation", "understanding", "both"))
    assert len(generation) == len(understanding) == 3 * 7 and generation | understanding == both
    assert all("_moe_gen" in path for path in generation)
    assert chosen(tower="both", targets=("q_proj*",)) == {path for path in both if ".q_proj" in path}
    assert chosen(targets=("*.layers.1.mlp*",)) == {path for path in generation if ".layers.1.mlp" in path}
    with pytest.raises(LanceError, match="match no layer of the generation tower"):
        chosen(targets=("nothing",))
    for wrong, said in (({"rank": 0}, "rank 0"), ({"alpha": -1.0}, "alpha -1.0"), ({"tower": "left"}, "tower 'left'")):
        with pytest.raises(LanceError, match=said):
            LoRASettings(**wrong)


def test_new_adapters_change_nothing(pipeline, checkpoint):
    request = Request("t2i", "a cat", height=32, width=32, num_steps=2)
    fresh = load(checkpoint, Variant.VIDEO, FLOAT32)
    before = list(pipeline.denoise(pipeline.prepare(request)))[-1].x_next
    add_adapters(fresh.model, [Adapter("new", new_pairs(fresh.model, LoRASettings(tower="both"), mx.random.key(0)))])
    assert mx.array_equal(list(fresh.denoise(fresh.prepare(request)))[-1].x_next, before)


@pytest.mark.parametrize("form", ["mlx", "peft"])
def test_a_folder_is_read_as_it_was_written(pipeline, tmp_path, form):
    pairs = drawn(pipeline)
    write_adapter(tmp_path / "one", pairs, peft=form == "peft", notes={"base": "x"})
    read = read_adapter(tmp_path / "one")
    assert read.pairs.keys() == pairs.keys()
    for path, pair in pairs.items():
        assert mx.array_equal(read.pairs[path].a, pair.a) and mx.array_equal(read.pairs[path].b, pair.b)
        assert read.pairs[path].scale == pytest.approx(2.0)
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    if form == "mlx":
        assert config["lora_parameters"] == {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": sorted(pairs)}
        assert config["fine_tune_type"] == "lora" and config["base"] == "x"
        assert load_file(tmp_path / "one" / "adapters.safetensors")[f"{Q}.lora_a"].shape == (64, 4)
    else:
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
        tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
        assert tensors[f"base_model.model.{Q}.lora_A.weight"].shape == (4, 64)


def test_peft_scales_by_pattern_and_root(pipeline, peft_folder, tmp_path):
    config = json.loads((peft_folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.safetensors").write_bytes((peft_folder / "adapter_model.safetensors").read_bytes())
    config |= {"use_rslora": True, "alpha_pattern": {"q_proj_moe_gen": 3}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    pairs = read_adapter(tmp_path).pairs
    assert pairs[Q].scale == pytest.approx(3 / 2) and pairs[Q.replace("q_proj", "k_proj")].scale == pytest.approx(8 / 2)


def final(checkpoint, lora=(), numerics=FLOAT32, **options) -> np.ndarray:
    request = Request("t2i", "a cat", height=32, width=32, num_steps=2, seed=1)
    made = open_checkpoint(checkpoint, numerics, variant="image", lora=lora, **options).generate(request)
    return np.array(made.latents.astype(mx.float32))


def off(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_adapters_are_used_on_every_base(checkpoint, folder, peft_folder):
    several = [(folder, 0.5), (peft_folder, 1.0)]
    plain, used = final(checkpoint), final(checkpoint, several)
    assert off(used, plain) > 0.05
    assert np.array_equal(used, final(checkpoint, several, low_ram=True))
    assert np.array_equal(plain, final(checkpoint, [(folder, 0.0)]))
    assert off(final(checkpoint, [(folder, -0.5), (peft_folder, 1.0)]), used) > 0.05
    assert off(final(checkpoint, several, BFLOAT16), used) < 0.05
    quantized = final(checkpoint, several, quantize=8)
    assert off(quantized, used) < 0.5 * off(used, plain)
    assert off(quantized, final(checkpoint, quantize=8)) > 0.05


def test_several_adapters_are_one_of_their_joint_rank(pipeline, checkpoint, folder, peft_folder):
    fresh = load(checkpoint, Variant.VIDEO, FLOAT32)
    one, two = read_adapter(folder).scaled(0.5), read_adapter(peft_folder)
    add_adapters(fresh.model, [one, two])
    joint = pairs_of(fresh.model)
    assert joint[Q].a.shape == (64, 8) and joint[UP].a.shape == (64, 4)
    np.testing.assert_allclose(
        np.array(joint[Q].delta()), np.array(one.pairs[Q].delta() + two.pairs[Q].delta()), rtol=1e-5, atol=1e-6
    )


def test_answers_use_adapters_too(checkpoint, folder, media):
    from lance_mlx import Question, Visual

    question = Question("x2t_image", "what", (Visual(str(media / "phone.jpg"), "image"),), max_new_tokens=6,
                        vit_resolution=56)  # fmt: skip
    plain = open_checkpoint(checkpoint, FLOAT32).answer(question).tokens
    used = open_checkpoint(checkpoint, FLOAT32, lora=[(folder, 4.0)]).answer(question).tokens
    assert used != plain
    assert used == open_checkpoint(checkpoint, FLOAT32, lora=[(folder, 4.0)], low_ram=True).answer(question).tokens


def damaged(folder, tmp_path, change):
    copy = tmp_path / "copy"
    copy.mkdir()
    tensors = load_file(folder / "adapters.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, copy / "adapters.safetensors")
    (copy / "adapter_config.json").write_text(json.dumps(config))
    return copy


DAMAGE = {
    "half": (lambda t, c: t.pop(f"{Q}.lora_a"), "lacks a half"),
    "other ranks": (lambda t, c: t.update({f"{Q}.lora_b": np.zeros((3, 64), np.float32)}), "do not fit each other"),
    "one axis": (lambda t, c: t.update({f"{Q}.lora_b": np.zeros(4, np.float32)}), "adapters have two axes"),
    "not finite": (lambda t, c: t.update({f"{Q}.lora_b": np.full((4, 64), np.nan, np.float32)}), "NaN or infinite"),
    "no adapter": (lambda t, c: t.update({"x.weight": np.zeros((4, 4), np.float32)}), "no part of a LoRA adapter"),
    "empty": (lambda t, c: t.clear(), "holds no adapter"),
    "dora": (lambda t, c: c.update(fine_tune_type="dora"), "only LoRA is read"),
    "no scale": (lambda t, c: c["lora_parameters"].pop("scale"), "'scale' must be a number"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_named(folder, tmp_path, damage):
    change, said = DAMAGE[damage]
    with pytest.raises(LanceError, match=said) as raised:
        read_adapter(damaged(folder, tmp_path, change))
    assert str(tmp_path) in str(raised.value)


def test_an_adapter_of_another_model_is_named(pipeline, folder):
    layer = adaptable(pipeline.model)[Q]
    assert layer.weight.shape == (64, 64)
    for path, a, said in ((Q, (32, 4), "of a layer of 32 to 64, not of 64 to 64"), ("x.y", (64, 4), "no layer 'x.y'")):
        other = Adapter("other", {path: Pair(mx.zeros(a), mx.zeros((4, 64)), 1.0)})
        with pytest.raises(LanceError, match=said):
            add_adapters(pipeline.model, [other])
    assert pairs_of(pipeline.model) == {}


def test_missing_folders_and_mixed_scales_are_named(tmp_path, folder):
    with pytest.raises(LanceError, match="there is no adapters.safetensors or adapter_model.safetensors"):
        read_adapter(tmp_path)
    pairs = dict(read_adapter(folder).pairs)
    pairs[Q] = pairs[Q]._replace(scale=1.0)
    with pytest.raises(LanceError, match="several ranks or scales"):
        write_adapter(tmp_path / "new", pairs)


def test_generate_uses_and_notes_them(invoke, refused, checkpoint, folder, peft_folder, tmp_path):
    common = [
        "generate",
        "t2i",
        "--model",
        checkpoint,
        "--prompt",
        "a cat",
        "--width",
        32,
        "--height",
        32,
        "--steps",
        2,
    ]
    common += ["--numerics", "float32"]
    done = invoke(*common, "--lora", folder, "0.5", f"--lora={peft_folder}", "-o", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    metadata = read_metadata(tmp_path / "a.png")
    assert metadata["lora"] == [[str(folder), 0.5], [str(peft_folder), 1.0]]
    replayed = ["--config-from", tmp_path / "a.png", "-o", tmp_path / "b.png"]
    again = invoke("generate", "t2i", "--model", checkpoint, *replayed)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    (tmp_path / "t2i.json").write_text('{"1.png": "a cat"}')
    several = ["generate", "--requests", tmp_path / "t2i.json", "--model", checkpoint, "-o", tmp_path / "several"]
    several += [*common[6:], "--lora", folder]
    assert invoke(*several).returncode == 0 and "1 of 1 are there already" in invoke(*several).stdout
    assert "was made from another request" in refused(*several, "0.5")
    assert "was made from another request" in refused(*several[:-2])
    assert "there is no adapters.safetensors" in refused(*common, "--lora", tmp_path, "-o", tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "quantized"])
def test_fused_weights_draw_what_adapters_do(invoke, refused, checkpoint, folder, peft_folder, tmp_path, quantized):
    source = checkpoint
    if quantized:
        source = tmp_path / "packed"
        assert invoke("convert", checkpoint, source, "--variant", "image", "-q", "--dtype", "float32").returncode == 0
    done = invoke("fuse", source, tmp_path / "fused", "--lora", folder, "0.5", "--lora", peft_folder,
                  *([] if quantized else ["--variant", "image"]), "--dtype", "float32")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "adapters of 42 layers added" in done.stdout
    used = final(source, [(folder, 0.5), (peft_folder, 1.0)])
    assert off(final(tmp_path / "fused"), used) < 2e-5
    report = json.loads((tmp_path / "fused" / "conversion_report.json").read_text())
    assert [line.split()[:2] for line in report["added"]] == [[str(folder), "0.5"], [str(peft_folder), "1"]]
    assert "give the folder of an adapter with --lora" in refused("fuse", source, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_forms_are_converted_both_ways(invoke, refused, folder, tmp_path):
    assert invoke("convert-lora", folder, tmp_path / "peft", "--peft").returncode == 0
    assert invoke("convert-lora", tmp_path / "peft", tmp_path / "back").returncode == 0
    assert (tmp_path / "back" / "adapters.safetensors").read_bytes() == (folder / "adapters.safetensors").read_bytes()
    assert "exists already" in refused("convert-lora", folder, tmp_path / "peft")
