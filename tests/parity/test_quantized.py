"""Quantized models as what is judged: dequantizing by NumPy, the oracle that comes of it, and how it is asked for."""

import itertools
import json
import os
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from lance_mlx.checkpoint.recipe import Recipe
from lance_mlx.model.quantized import MODES
from parity.bundle.reading import read_bundle
from parity.cli.main import app
from parity.comparison.check import check_bundle
from parity.comparison.verdict import AGREE, DIVERGE
from parity.lance.dequantize import Packed, Scheme
from parity.lance.packed import FOLDER, PackedCheckpoint, packed_beside, run_folder
from parity.lance.quantized import quantized_bundle
from parity.lance.variants import UNROUNDED, variants_for, variants_of

SCHEMES = [Scheme(bits, groups, mode) for mode, (widths, sizes) in MODES.items() for bits in widths
           for groups in sizes]  # fmt: skip
LAYERS = "language_model.model.layers"
MATRICES = [f"self_attn.{kind}_proj{{0}}" for kind in "qkvo"] + [
    f"mlp{{0}}.{kind}_proj" for kind in ("gate", "up", "down")
]
OTHERS = {
    "language_model.lm_head": {"bits": 5, "group_size": 64},
    "language_model.model.embed_tokens": {"mode": "nvfp4"},
    "vit_model.blocks.*": {"bits": 4, "group_size": 32},
    f"{LAYERS}.2.self_attn.q_proj": False,
}


def every_scheme() -> dict:
    """A recipe in which both towers have every mode and width that their rows of 64 and 96 weights part into."""
    schemes = [scheme for scheme in SCHEMES if 64 % scheme.group_size == 0]
    recipe = dict(OTHERS)
    for tower, start in (("", 0), ("_moe_gen", len(schemes) // 2)):
        turn = itertools.islice(itertools.cycle(schemes), start, None)
        for layer, matrix in itertools.product(range(3), MATRICES):
            fits = (scheme for scheme in turn if "down" not in matrix or 96 % scheme.group_size == 0)
            recipe.setdefault(f"{LAYERS}.{layer}.{matrix.format(tower)}", asdict(next(fits)))
    return recipe


def packed_of(weight: mx.array, scheme: Scheme) -> Packed:
    packed, scales, *biases = mx.quantize(weight, scheme.group_size, scheme.bits, mode=scheme.mode)
    affine = scheme.mode == "affine"
    factors = [np.array(each.astype(mx.float32) if affine else each) for each in (scales, *biases)]
    return Packed(scheme, np.array(packed), *factors, *[] if affine else [None])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe in which every mode and width are in both towers, and everything that can be quantized."""
    path = tmp_path_factory.mktemp("recipe") / "mixed.json"
    path.write_text(json.dumps(every_scheme()))
    assert Recipe.from_file(path)
    return path


@pytest.fixture
def quick(alone, monkeypatch, tmp_path):
    """Measures rounding by a few variants, and keeps nothing of that."""
    monkeypatch.setenv("LANCE_PARITY_CACHE", str(tmp_path / "floors"))
    few = "attention in float64", "products in float64", "disturbed sums 1", "a unit in every last place 1"
    chosen = lambda bundle: [each for each in variants_for(bundle) if each.name in few]  # noqa: E731
    monkeypatch.setattr("parity.lance.definition.variants_for", chosen)
    with alone():
        yield


@pytest.fixture
def lance_parity(tmp_path, monkeypatch, oracles):
    monkeypatch.chdir(oracles.parent)

    def invoke(*arguments: object):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_numpy_unpacks_what_mlx_packs(scheme, dtype):
    weight = mx.random.normal((24, 256)).astype(dtype)
    packed = packed_of(weight, scheme)
    theirs = mx.dequantize(
        mx.array(packed.weight),
        mx.array(packed.scales) if packed.biases is None else mx.array(packed.scales).astype(dtype),
        packed.biases if packed.biases is None else mx.array(packed.biases).astype(dtype),
        scheme.group_size,
        scheme.bits,
        scheme.mode,
        dtype=mx.float32,
    )
    found = packed.dequantized()
    assert found.dtype == np.float32 and packed.codes.max() < 2**scheme.bits
    # bfloat16 factors are multiplied in bfloat16 there.
    np.testing.assert_allclose(found, np.array(theirs), atol=0.04 if dtype == mx.bfloat16 else 1e-6)
    exact = np.array(weight.astype(mx.float32))
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error < (0.04 if scheme.mode == "mxfp8" else 3 / 2**scheme.bits)


@pytest.mark.parametrize(
    "name",
    [
        "x2t_image-bf16-kv",
        *(
            pytest.param(n, marks=pytest.mark.exhaustive)
            for n in ("t2i-fp32-kv", "t2v-bf16-kv", "image_edit-fp32-nokv")
        ),
    ],
)
def test_a_quantized_model_computes_what_the_reference_does_with_the_dequantized_weights(oracles, recipe, alone, name):
    given = oracles / name
    with alone(), quantized_bundle(given, str(recipe)) as path:
        bundle = read_bundle(path)
        packed = packed_beside(bundle.checkpoint, bundle.variant)
        for tower in (True, False):
            held = {how for path, how in packed.schemes.items() if LAYERS in path and ("_moe_gen" in path) == tower}
            assert held >= {scheme for scheme in SCHEMES if 64 % scheme.group_size == 0}
        assert (UNROUNDED in variants_for(bundle)) == (bundle.dtype == "bfloat16")
        result = check_bundle(path, "mlx")
        assert result.verdict == AGREE and len(result.taps) >= len(bundle.taps) and not result.missing
        # It is not what the weights compute that were not quantized.
        before = read_bundle(given).taps
        assert not all(np.array_equal(tap.array, before[name].array) for name, tap in bundle.taps.items())


@pytest.mark.exhaustive
def test_packed_weights_that_are_not_rounded_are_a_variant(oracles, recipe, alone, monkeypatch, tmp_path):
    monkeypatch.setenv("LANCE_PARITY_CACHE", str(tmp_path))
    monkeypatch.setattr("parity.lance.definition.variants_for", lambda bundle: variants_of("bfloat16"))
    with alone(), quantized_bundle(oracles / "x2t_image-bf16-kv", str(recipe)) as path:
        assert check_bundle(path, "mlx").verdict == DIVERGE


def test_other_packed_weights_than_the_oracle_has_are_found(oracles, quick):
    with quantized_bundle(oracles / "t2i-fp32-kv", "8") as path:
        file = next(run_folder(*_place(path)).glob("*.safetensors"))
        tensors = load_file(file)
        name = f"{LAYERS}.1.mlp.up_proj.scales"
        tensors[name] = tensors[name] * np.float32(1.01)
        save_file(tensors, file, {"format": "mlx"})
        result = check_bundle(path, "mlx")
        assert result.verdict == DIVERGE and result.first_divergence["component"] == "layers.1.mlp"


def test_the_dequantized_checkpoint(oracles, tmp_path):
    with quantized_bundle(oracles / "t2i-fp32-kv", "8") as path:
        bundle = read_bundle(path)
        written = load_file(bundle.checkpoint / bundle.variant / "model.safetensors")
        source = load_file(oracles / "checkpoint-a" / "Lance_3B" / "model.safetensors")
        packed = packed_beside(bundle.checkpoint, bundle.variant)
        assert packed.folder == bundle.checkpoint / bundle.variant / FOLDER
        for name, array in source.items():
            if "pos_embed" in name:
                continue
            error = np.linalg.norm(written[name] - array) / np.linalg.norm(array)
            quantized = name.removesuffix(".weight") in packed.schemes
            assert 1e-3 < error < 0.02 if quantized else error == 0, name
        name = f"{LAYERS}.0.self_attn.q_proj"
        assert torch.equal(
            torch.from_numpy(written[f"{name}.weight"]), torch.from_numpy(packed.values(f"{name}.weight"))
        )
    assert not path.exists()


def test_the_command_takes_bits_recipes_and_folders(lance_parity, quick, tmp_path):
    bundle = "oracles/t2i-fp32-nokv"
    done = lance_parity("check", bundle, "--impl", "mlx", "--quantize", "8", "--json", tmp_path / "a.json")
    assert done.exit_code == 0 and json.loads((tmp_path / "a.json").read_text())["bundle"] == "t2i-fp32-nokv-q8"
    with quantized_bundle(Path(bundle), "8") as path:
        os.rename(run_folder(*_place(path)), tmp_path / "converted")
    done = lance_parity(
        "run", bundle, "--impl", "mlx", "--quantize", tmp_path / "converted", "--report", tmp_path / "r"
    )
    assert done.exit_code == 0 and "t2i-fp32-nokv-converted" in done.stdout
    done = lance_parity("localize", bundle, "--quantize", tmp_path / "converted", "--report", tmp_path / "l")
    assert done.exit_code == 0, done.stderr
    for what, said in (
        ("7", "bits 7 does not go with mode affine"),
        ("nothing", "there is no recipe 'nothing'"),
        (tmp_path, "is not readable JSON"),
    ):
        done = lance_parity("check", bundle, "--impl", "mlx", "--quantize", what)
        assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = lance_parity("check", "oracles/t2v-bf16-kv", "--impl", "mlx", "--quantize", tmp_path / "converted")
    assert done.exit_code == 2 and "this run needs Lance_3B_Video in bfloat16" in done.stderr
    config = tmp_path / "converted" / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "quantization"}))
    done = lance_parity("run", bundle, "--impl", "mlx", "--quantize", config.parent, "--report", tmp_path / "r")
    assert done.exit_code == 2 and "is not quantized" in done.stdout.replace("\n", "")


def test_a_recorded_quantized_bundle_stays(lance_parity, quick, tmp_path):
    out = tmp_path / "kept" / "bird"
    how = ("--checkpoint", "oracles/checkpoint-a", "--prompt", "a bird", "--width", 64, "--height", 48, "--steps", 2)
    done = lance_parity("record", "t2i", *how, "--numerics", "float32", "--quantize", "4", "--out", out)
    assert done.exit_code == 0, done.stderr
    assert PackedCheckpoint(run_folder(out.with_name("bird-checkpoint"), "Lance_3B")).schemes
    assert lance_parity("verify", out).exit_code == 0
    assert lance_parity("compare", out, "@mlx").exit_code == 0
    assert lance_parity("stream", "--against", out).exit_code == 0
    done = lance_parity("record", "t2i", *how, "--quantize", "4", "--out", out)
    assert done.exit_code == 2 and "exists already" in done.stderr
    done = lance_parity("record", "t2i", *how, "--quantize", "4", "--out", tmp_path / "x", "--upstream", tmp_path)
    assert done.exit_code == 2 and "runs no quantized weights" in done.stderr


def _place(path: Path) -> tuple[Path, str]:
    bundle = read_bundle(path)
    return bundle.checkpoint, bundle.variant
