#!/usr/bin/env python3
"""Write a checkpoint in the official layout with random weights, at any size, a block at a time.

    python scripts/make_checkpoint.py OUT [--size tiny|official] [--variant image|video|both] [--seed N]
        [--profile plain|outlier] [--planted LAYER,...] [--dtype float32|bfloat16] [--layers N] [--hidden N] ...

OUT is the folder to make. The same options make the same bytes, and every tensor has its own stream of random numbers,
so that a value depends on the seed, the profile and the names of its file and tensor alone. Activations stay near unit
size through all layers; the outlier profile has the few large channels and norm scales of trained models. Planted
layers compute what they would without, but with one weight in 32 that is 32 times as large as the others, which is
hard to quantize. The stored position table, which nothing reads, is random too.
Exit status: 0 written, 2 bad input, 130 interrupted.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lance_mlx.checkpoint.pth import read_pth
from lance_mlx.checkpoint.safetensors import TensorInfo, to_bfloat16, write_safetensors
from lance_mlx.errors import LanceError
from reference.config import LanguageConfig, VisionConfig
from reference.numerics import Numerics
from reference.transformer import Lance
from reference.vae import VAE
from reference.vae_decoder import DecoderPlan
from reference.vae_encoder import EncoderPlan
from reference.vit import VisionTower

ROOT = Path(__file__).resolve().parents[1]
TOY_TOKENIZER = ROOT / "oracles" / "checkpoint-a" / "Lance_3B"
TOKENIZER = ROOT / "tests" / "data" / "tokenizer"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
OFFICIAL_VOCABULARY = 151936
# Rows of the stored position table: one frame of 64x64 cells, and 31 of them.
POSITION_ROWS = {"Lance_3B": 64 * 64, "Lance_3B_Video": 31 * 64 * 64}
FOLDERS = {"image": ("Lance_3B",), "video": ("Lance_3B_Video",), "both": ("Lance_3B", "Lance_3B_Video")}
VISUAL_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "vision_token_id": "<|vision_pad|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
}
# What leaves the model, or the branch that it ends: large channels there would show in nothing but the output.
UNSCALED = ("lm_head", "llm2vae", "conv1.", "conv2.", "decoder.head", "decoder.conv1", "encoder.conv1", "pos_embed")
BLOCK_BYTES = 1 << 24
# Of planted layers: how much larger one in so many channels of a matrix's input is, and what is as much smaller for it.
PLANTED, EVERY = np.float32(32), 32
LARGE_COLUMNS = re.compile(r"self_attn\.[qkv]_proj(_moe_gen)?\.weight|mlp(_moe_gen)?\.(gate|up|down)_proj\.weight")
SMALL_ROWS = re.compile(r"(input|post_attention)_layernorm(_moe_gen)?\.weight|mlp(_moe_gen)?\.up_proj\.(weight|bias)")


@dataclass(frozen=True)
class Size:
    """Every width of a checkpoint; channels of the VAE's encoder and decoder are those of their narrowest stage."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    vit_layers: int
    vit_hidden: int
    vit_intermediate: int
    vit_heads: int
    vit_full_attention_every: int
    vae_encoder: int
    vae_decoder: int


SIZES = {
    "tiny": Size(3, 64, 96, 4, 2, 512, 4, 32, 48, 2, 2, 8, 8),
    "official": Size(36, 2048, 11008, 16, 2, OFFICIAL_VOCABULARY, 32, 1280, 3420, 16, 8, 160, 256),
}


def vit_config(size: Size) -> dict:
    """Qwen2.5-VL-ViT/config.json."""
    return {
        "model_type": "qwen2_5_vl",
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
        "hidden_act": "silu",
        "depth": size.vit_layers,
        "hidden_size": size.vit_hidden,
        "intermediate_size": size.vit_intermediate,
        "num_heads": size.vit_heads,
        "out_hidden_size": size.hidden,
        "window_size": 112,
        "fullatt_block_indexes": [
            j for j in range(size.vit_layers) if (j + 1) % size.vit_full_attention_every == 0
        ],
    }  # fmt: skip


def llm_config(size: Size, tokenizer: Path) -> dict:
    """llm_config.json, with the ids that the tokenizer gives the visual tokens."""
    added = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))["added_tokens_decoder"]
    ids = {entry["content"]: int(index) for index, entry in added.items()}
    half = size.hidden // size.heads // 2
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        **{key: ids[token] for key, token in VISUAL_TOKENS.items()},
        "vision_config": {key: value for key, value in vit_config(size).items() if key != "model_type"},
        "vocab_size": size.vocabulary,
        # A quarter of the pairs turns with time, the rest with rows and columns alike.
        "rope_scaling": {"type": "mrope", "mrope_section": [half // 4, 3 * half // 8, 3 * half // 8]},
        "max_position_embeddings": 128000,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
    }


def vae_plans(size: Size) -> tuple[DecoderPlan, EncoderPlan]:
    """Wan 2.2's four stages each way: channels in and out, residual blocks, resampling in space and in time."""
    d, e = size.vae_decoder, size.vae_encoder
    up = [(4 * d, 4 * d, 3, True, True), (4 * d, 4 * d, 3, True, True), (4 * d, 2 * d, 3, True, False)]
    down = [(e, e, 2, True, False), (e, 2 * e, 2, True, True), (2 * e, 4 * e, 2, True, True)]
    decoder = DecoderPlan(48, 4 * d, [*up, (2 * d, d, 3, False, False)])
    return decoder, EncoderPlan(e, [*down, (4 * e, 4 * e, 2, False, False)])


def shapes(module: torch.nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's parameters."""
    return {prefix + name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


@dataclass(frozen=True)
class Weights:
    """Where random values come from.

    Attributes:
        depth: layers that add to one residual stream, which makes each add less.
        planted: layers whose weights have outliers that change nothing.
    """

    seed: int
    profile: str
    depth: int
    planted: tuple[int, ...] = ()

    def blocks(self, file: str, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Yield the float32 values of a tensor, flat, whole rows at a time."""
        rng = self._stream(f"{file}/{name}")
        rows, columns = shape[0], int(np.prod(shape[1:]))
        factors = self._row_factors(file, name, rows)
        step = max(1, BLOCK_BYTES // (4 * columns))
        norm = "norm" in name or "ln_q" in name or name.endswith("gamma")
        for start in range(0, rows, step):
            values = rng.standard_normal((min(step, rows - start), columns), np.float32)
            values *= np.float32(self._spread(name, shape, norm))
            if norm:
                values += 1
            values *= factors[start : start + step, None]
            if self._plants(LARGE_COLUMNS, name):
                values[:, ::EVERY] *= PLANTED
            yield values.reshape(-1)

    def _plants(self, kind: re.Pattern, name: str) -> bool:
        match = re.fullmatch(r"language_model\.model\.layers\.(\d+)\.(.*)", name)
        return bool(match and int(match[1]) in self.planted and kind.fullmatch(match[2]))

    def _spread(self, name: str, shape: tuple[int, ...], norm: bool) -> float:
        if norm:
            return 0.1
        if name.endswith("bias"):
            return 0.02
        if "embed" in name and len(shape) == 2:
            return 0.05
        spread = float(np.prod(shape[1:])) ** -0.5
        if name.endswith(("o_proj.weight", "o_proj_moe_gen.weight", "down_proj.weight", "attn.proj.weight")):
            return spread * (2 * self.depth) ** -0.5
        # Few of the pixels are to reach the bounds of [-1, 1], where differences are cut off.
        return spread * (0.3 if name.startswith("decoder.head") else 1)

    def _row_factors(self, file: str, name: str, rows: int) -> np.ndarray:
        factors = np.ones(rows, np.float32)
        if self._plants(SMALL_ROWS, name):
            factors[::EVERY] /= PLANTED
        if self.profile == "plain" or name.endswith("bias") or any(part in name for part in UNSCALED):
            return factors
        # One channel in two hundred is about ten times as large as the others, which differ by a third.
        rng = self._stream(f"{file}/{name}/rows")
        factors *= np.exp(rng.standard_normal(rows, np.float32) / 3)
        large = rng.random(rows) < 1 / 200
        factors[large] *= 10 * np.exp(rng.standard_normal(int(large.sum()), np.float32) / 2)
        return factors

    def _stream(self, name: str) -> np.random.Generator:
        key = hashlib.sha256(f"{self.seed}/{self.profile}/{name}".encode()).digest()[:16]
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def write_file(folder: Path, file: str, named: dict[str, tuple[int, ...]], dtype: str, weights: Weights, bar) -> None:
    """Write one safetensors file."""
    infos = {name: TensorInfo(dtype, named[name]) for name in sorted(named)}

    def blocks(name: str) -> Iterator[np.ndarray]:
        for block in weights.blocks(file, name, named[name]):
            values = to_bfloat16(block) if dtype == "bfloat16" else block
            yield values
            bar.update(values.nbytes)

    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as opened:
        write_safetensors(opened, infos, blocks, {"format": "pt"})


def write_vae(folder: Path, file: str, named: dict[str, tuple[int, ...]], weights: Weights, bar) -> None:
    """Write the VAE as torch.save does: the file with room for the values, then the values."""
    path = folder / file
    # Memory that nobody touches is never given.
    state = {name: torch.empty(shape) for name, shape in named.items()}
    with torch.serialization.skip_data():
        torch.save(state, path)
    del state
    with path.open("r+b") as opened:
        for name, tensor in read_pth(path).items():
            opened.seek(tensor.offset)
            for block in weights.blocks(file, name, tensor.shape):
                opened.write(block)
                bar.update(block.nbytes)


def make(out: Path, size: Size, variant: str, dtype: str, tokenizer: Path, weights: Weights) -> int:
    """Write the checkpoint; returns its bytes of weights."""
    config, vision = llm_config(size, tokenizer), vit_config(size)
    folders = FOLDERS[variant]
    for folder in folders:
        (out / folder).mkdir(parents=True)
        (out / folder / "llm_config.json").write_text(json.dumps(config, indent=2))
        for name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer / name, out / folder / name)
    (out / "Qwen2.5-VL-ViT").mkdir()
    (out / "Qwen2.5-VL-ViT" / "config.json").write_text(json.dumps(vision, indent=2))
    numerics = Numerics("float32")
    with torch.device("meta"):
        language = LanguageConfig.from_file(out / folders[0] / "llm_config.json")
        lance = shapes(Lance(language, numerics))
        vit = VisionTower(VisionConfig.from_file(out / "Qwen2.5-VL-ViT" / "config.json"), numerics)
        decoder, encoder = vae_plans(size)
        vae = shapes(VAE(decoder, numerics, encoder))
    files = {"Qwen2.5-VL-ViT/vit.safetensors": shapes(vit)}
    for folder in folders:
        named = lance | {"latent_pos_embed.pos_embed": (POSITION_ROWS[folder], size.hidden)}
        files[f"{folder}/model.safetensors"] = named | (shapes(vit, "vit_model.") if "Video" in folder else {})
    total = sum(TensorInfo(dtype, shape).nbytes for named in files.values() for shape in named.values())
    total += sum(TensorInfo("float32", shape).nbytes for shape in vae.values())
    free = shutil.disk_usage(out).free
    if total > free:
        short = f"{free / 1e9:.1f} GB free, {total / 1e9:.1f} GB are needed"
        raise LanceError(f"{out.parent} has {short}: choose another OUT")
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", leave=False, disable=None) as bar:
        for file, named in files.items():
            write_file(out, file, named, dtype, weights, bar)
        write_vae(out, "Wan2.2_VAE.pth", vae, weights, bar)
    return total


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options; those that are named like a field of Size override the preset."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--variant", choices=FOLDERS, default="both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", choices=("plain", "outlier"), default="plain")
    parser.add_argument("--planted", type=layers_of, default=(), metavar="LAYER,...", help="layers that get outliers")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the safetensors files")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer's files; one that fits by default")
    for field in fields(Size):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, metavar="N")
    return parser.parse_args(arguments)


def layers_of(text: str) -> tuple[int, ...]:
    """Numbers of layers with commas between them."""
    return tuple(int(number) for number in text.split(","))


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    options = parsed(arguments)
    started = time.perf_counter()
    given = {field.name: getattr(options, field.name) for field in fields(Size)}
    size = replace(SIZES[options.size], **{name: value for name, value in given.items() if value is not None})
    tokenizer = options.tokenizer or (TOY_TOKENIZER if size.vocabulary < OFFICIAL_VOCABULARY else TOKENIZER)
    beside = options.out.with_name(f".{options.out.name}.{os.getpid()}")
    try:
        if options.out.exists():
            raise LanceError(f"{options.out} exists already: choose another folder, or remove it")
        if size.hidden % size.heads or size.hidden // size.heads % 16:
            raise LanceError(f"--hidden {size.hidden} must be a multiple of 16 times --heads {size.heads}")
        if absent := [layer for layer in options.planted if not 0 <= layer < size.layers]:
            raise LanceError(f"--planted {absent[0]} is none of the {size.layers} layers")
        beside.mkdir(parents=True)
        weights = Weights(options.seed, options.profile, size.layers, options.planted)
        total = make(beside, size, options.variant, options.dtype, tokenizer, weights)
        beside.rename(options.out)
    except (LanceError, OSError, KeyError) as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_checkpoint: interrupted, nothing written", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    seconds = time.perf_counter() - started
    print(f"{options.out}: {total / 1e9:.2f} GB, {seconds:.1f} s, peak memory {memory / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
