"""The integers of a request's sequence, from the launcher with a model that computes nothing and reads no weights."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from parity.lance.recorded_taps import INPUTS
from parity.lance.upstream.adapt import Upstream, inputs_of

TOKENS = 16
"""Answer tokens whose positions are laid out where a request names no number."""
WIDTH = 16
LLM = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "mrope"},
}
VIT = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 1, "out_hidden_size": WIDTH}


class Tower(nn.Module):
    """A vision tower that returns as many tokens as the real one does, all zero."""

    def __init__(self, config: object) -> None:
        super().__init__()

    def load_state_dict(self, *args: object, **values: object) -> None:
        """Take no weights."""

    def forward(self, hidden_states: Tensor, grid_thw: Tensor) -> Tensor:
        """Return zeros [n / 4, WIDTH] for [n, 1176] patches."""
        return hidden_states.new_zeros(len(hidden_states) // 4, WIDTH)


class Coder:
    """A VAE that returns latents as large as the real one's, all zero."""

    def __init__(self) -> None:
        # modeling/vae/wan/model.py:WanVideoVAE
        self.vae_config = Coder.parameters(downsample_spatial=16, downsample_temporal=4, z_channels=48)

    def vae_encode(self, samples: list[Tensor]) -> list[Tensor]:
        """Return zeros [t, h, w, 48] for each [3, T, H, W]."""
        sizes = [sample.shape[1:] for sample in samples]
        return [torch.zeros((frames - 1) // 4 + 1, height // 16, width // 16, 48) for frames, height, width in sizes]

    def vae_decode(self, latents: list[Tensor]) -> list[Tensor]:
        """Return a black pixel for each latent."""
        return [torch.zeros(3, 1, 1, 1) for _ in latents]


def record_layout(
    upstream: Upstream, job: Mapping[str, Any], launch: Callable[[tuple[Path, Path]], None]
) -> dict[str, np.ndarray]:
    """Run the launcher, by `launch` on folders of a model and a vision tower, and return the arrays of a layout."""
    launcher = upstream.launcher
    launcher.Qwen2_5_VisionTransformerPretrainedModel = Tower
    launcher.WanVideoVAE, Coder.parameters = Coder, launcher.AutoEncoderParams
    launcher.MAX_GENERATION_LENGTH = TOKENS
    launcher.load_file = lambda path: {}
    launcher.init_from_model_path_if_needed = lambda model, arguments: None
    seen: dict[str, Any] = {"positions": [], "times": [], "contexts": []}
    _compute_nothing(upstream, seen)
    upstream.before_sampling(lambda values: _watch(values, seen))
    launch(_folders(job))
    return _arrays(seen, job["request"])


def _folders(job: Mapping[str, Any]) -> tuple[Path, Path]:
    """Folders of a model and of a vision tower at a tiny width, with the tokenizer and the ids of a real one."""
    model, vit = Path(job["out"]) / "model", Path(job["out"]) / "vit"
    model.mkdir()
    vit.mkdir()
    for file in Path(job["tokenizer"]).iterdir():
        if file.suffix in (".json", ".txt") and file.name != "llm_config.json":
            (model / file.name).symlink_to(file.resolve())
    config = json.loads(Path(job["llm_config"]).read_text(encoding="utf-8"))
    (model / "llm_config.json").write_text(json.dumps(config | LLM), encoding="utf-8")
    (vit / "config.json").write_text(json.dumps(config["vision_config"] | VIT), encoding="utf-8")
    return model, vit


def _compute_nothing(upstream: Upstream, seen: dict[str, Any]) -> None:
    """Let the layers return what they are given, and keep the positions that are made for them."""
    navit, lance = upstream.navit, upstream.lance
    index, shift = navit.Qwen2ForCausalLM.get_rope_index, lance.shift_position_ids

    def passed(self: nn.Module, packed_query_sequence: Tensor, past_key_values: object, **values: object) -> object:
        seen["before"] = int(values["key_values_lens"].sum())
        return navit.BaseNavitOutputWithPast(packed_query_sequence, past_key_values)

    def indexed(self: nn.Module, **values: Any) -> tuple[Tensor, Tensor]:
        ids, deltas = index(self, **values)
        seen["unshifted"] = ids
        return ids, deltas

    def shifted(*args: Any, **values: Any) -> Tensor:
        ids = shift(*args, **values)
        seen["positions"].append(ids)
        return ids

    navit.Qwen2Model.forward, navit.Qwen2ForCausalLM.get_rope_index = passed, indexed
    lance.shift_position_ids = shifted


def _watch(values: Mapping[str, Any], seen: dict[str, Any]) -> None:
    model, batch = values["fsdp_model"], values["val_data_cpu"]
    seen["inputs"] = inputs_of(batch)
    model.latent_pos_embed.register_forward_pre_hook(lambda module, args: seen.update(places=args[0]))
    model.language_model.lm_head.register_forward_pre_hook(lambda module, args: seen["contexts"].append(seen["before"]))
    model.time_embedder.register_forward_pre_hook(lambda module, args: seen["times"].append(args[0].max()))


def _arrays(seen: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, np.ndarray]:
    inputs = {name: tap.array for name, tap in seen["inputs"].items()}
    arrays = {name: inputs[name] for name in INPUTS if name in inputs}
    for kind, name in (("vae_pixels", "vae_pixel_shapes"), ("vit_patches", "vit_patch_shapes")):
        shapes = [array.shape for key, array in inputs.items() if key.startswith(kind)]
        if shapes:
            arrays[name] = np.array(shapes, np.int32)
    if request["task"].startswith("x2t"):
        arrays["position_ids.cond"] = seen["unshifted"][:, 0].numpy().astype(np.int32)
        arrays["context_len"] = np.array([seen["contexts"][0]], np.int32)
        return arrays
    for arm, ids in zip(("cond", "uncond"), seen["positions"], strict=False):
        arrays[f"position_ids.{arm}"] = ids[:, 0].numpy().astype(np.int32)
    # The cached entry embeds t = 1 once before the steps; the schedule ends at 0.
    arrays["timesteps"] = np.array([*(float(t) for t in seen["times"][1:]), 0.0], np.float32)
    arrays["latent_position_ids"] = seen["places"].numpy().astype(np.int32)
    return arrays
