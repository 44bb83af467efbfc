"""Checkpoints in other layouts, made from an official one for tests."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import torch

from lance_mlx.requests.request import Variant

TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json")
ROWS = {Variant.IMAGE: 4096, Variant.VIDEO: 126976}


def community_lance(name: str) -> str:
    """xocialize/lance-mlx scripts/02_convert.py."""
    name = re.sub(r"^language_model\.(model\.)?", "", name)
    name = re.sub(r"^vae2llm", "vae_in_proj.vae2llm", name)
    return name.replace("time_embedder.mlp.0", "time_embedder.proj_in").replace("mlp.2", "proj_out")


def community_vae(name: str) -> str:
    """xocialize/lance-mlx scripts/06_convert_wan_vae.py."""
    name = re.sub(r"\b(head|residual)\.(\d+)\.([^.]+)$", r"\1.layer_\2.\3", name)
    name = re.sub(r"\.resample\.1\.(weight|bias)$", r".resample_\1", name)
    return re.sub(r"\.(to_qkv|proj)\.(weight|bias)$", r".\1_\2", name)


def make_community(official: Path, variant: Variant, folder: Path) -> Path:
    """What mlx-community publishes of one variant: bfloat16, but norms float32."""
    folder.mkdir()
    source = official / variant
    for name in TOKENIZER:
        shutil.copyfile(source / name, folder / name)
    config = json.loads((source / "llm_config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = mx.load(str(source / "model.safetensors"))
    tensors["latent_pos_embed.pos_embed"] = mx.zeros((ROWS[variant], 4))
    own = [name for name in tensors if name.startswith("vit_model.")]
    vit = {name.removeprefix("vit_model."): tensors.pop(name) for name in own}
    vit = vit or mx.load(str(official / "Qwen2.5-VL-ViT" / "vit.safetensors"))

    def rounded(name: str, array: mx.array) -> mx.array:
        return array if "norm" in name and "blocks" not in name else array.astype(mx.bfloat16)

    named = {community_lance(name): rounded(name, array) for name, array in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), named)
    mx.save_safetensors(str(folder / "vit.safetensors"), {n: a.astype(mx.bfloat16) for n, a in vit.items()})
    state = torch.load(official / "Wan2.2_VAE.pth", weights_only=True)
    vae = {}
    for name, tensor in state.items():
        tensor = tensor.reshape(-1) if name.endswith("gamma") else tensor
        tensor = tensor.movedim(1, -1).contiguous() if tensor.ndim > 1 else tensor
        vae[community_vae(name)] = mx.array(tensor.numpy()).astype(mx.bfloat16)
    mx.save_safetensors(str(folder / "vae.safetensors"), vae)
    return folder
