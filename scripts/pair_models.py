"""Models of mlx-lm and what they are ports of in transformers, small and with random weights."""

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers

from parity.pairs import Pair, Part, copy_weights

TOKENS, WORDS = 20, 256
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
    "max_position_embeddings": 512,
}
EXPERTS = {
    f"switch_mlp.{ours}.weight": (f"experts.{theirs}", number, count)
    for ours, theirs, number, count in (
        ("gate_proj", "gate_up_proj", 0, 2),
        ("up_proj", "gate_up_proj", 1, 2),
        ("down_proj", "down_proj", 0, 1),
    )
}


@dataclass(frozen=True)
class Model:
    """A pair: transformers' class, by its name without Config and ForCausalLM, and mlx-lm's module.

    Attributes:
        trusted: settings of transformers' own; the port takes them from its config.json.
        port: settings that the port calls otherwise.
        names, parts: see parity.pairs.Pair.
        dtypes: what MLX's CPU backend can compute it in.
    """

    kind: str
    module: str
    trusted: Mapping[str, Any]
    port: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def pair(self, dtype: str, seed: int = 0) -> Pair:
        """Both models with the weights of a seed."""
        warnings.filterwarnings("ignore")
        transformers.logging.set_verbosity_error()
        torch.manual_seed(seed)
        config = getattr(transformers, f"{self.kind}Config")(**self.trusted)
        head = "LMHeadModel" if self.kind == "GPT2" else "ForCausalLM"
        trusted = getattr(transformers, f"{self.kind}{head}")(config).eval()
        for parameter in trusted.parameters():
            # Biases and norms other than 0 and 1, so that one that is left out shows.
            parameter.data += 0.05 * torch.randn_like(parameter)
        trusted = trusted.to(getattr(torch, dtype))
        made = self.ported()
        values = config.to_dict() | {"model_type": self.module} | dict(self.port)
        port = made.Model(made.ModelArgs.from_dict(values))
        if values.get("tie_word_embeddings") and hasattr(port, "lm_head"):
            port.sanitize({})
        ids = np.random.default_rng(seed).integers(0, WORDS, (1, TOKENS))
        pair = Pair(trusted, port, {"input_ids": ids}, names=self.names, parts=self.parts)
        copy_weights(pair)
        return pair

    def ported(self) -> Any:
        """mlx-lm's module."""
        return importlib.import_module(f"mlx_lm.models.{self.module}")


def _rotary(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


def _experts(ours: str, theirs: str) -> dict[str, Part]:
    layer = "model.layers.*"
    return {
        f"{layer}.{ours}.{name}": Part(f"{layer}.{theirs}.{of}", n, count, 1)
        for name, (of, n, count) in EXPERTS.items()
    }


MODELS = {
    "llama": Model("Llama", "llama", SIZES | _rotary(5e5), {"rope_theta": 5e5}),
    "qwen2": Model("Qwen2", "qwen2", SIZES | _rotary(1e6), {"rope_theta": 1e6}),
    "qwen3": Model("Qwen3", "qwen3", SIZES | {"head_dim": 16} | _rotary(1e6), {"rope_theta": 1e6}),
    "phi3": Model("Phi3", "phi3", SIZES | {"pad_token_id": 0} | _rotary(1e4), {"rope_theta": 1e4}),
    "gemma2": Model(
        "Gemma2", "gemma2", SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16} | _rotary(1e4), {"rope_theta": 1e4}
    ),
    "olmo2": Model("Olmo2", "olmo2", SIZES | {"pad_token_id": 0} | _rotary(1e4), {"rope_theta": 1e4}),
    "starcoder2": Model("Starcoder2", "starcoder2", SIZES | _rotary(1e4), {"rope_theta": 1e4}),
    "gpt2": Model(
        "GPT2", "gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": WORDS, "n_positions": 64},
        {"n_ctx": 64}, {"model": "transformer"},
    ),
    "gpt_neox": Model(
        "GPTNeoX", "gpt_neox", SIZES | {"intermediate_size": 256} | _rotary(1e4, partial_rotary_factor=0.25),
        {"rotary_emb_base": 1e4, "rotary_pct": 0.25},
        {"model": "gpt_neox", "model.h": "gpt_neox.layers", "model.embed_out": "lm_head"},
    ),
    "cohere": Model("Cohere", "cohere", SIZES | {"pad_token_id": 0} | _rotary(1e4), {"rope_theta": 1e4}),
    "stablelm": Model(
        "StableLm", "stablelm", SIZES | _rotary(1e4, partial_rotary_factor=0.25),
        {"rope_theta": 1e4, "partial_rotary_factor": 0.25},
    ),
    "glm4": Model(
        "Glm4", "glm4", SIZES | {"head_dim": 16, "pad_token_id": 0} | _rotary(1e4, partial_rotary_factor=0.5),
        {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "granite": Model(
        "Granite", "granite",
        SIZES | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
                 "logits_scaling": 2.0} | _rotary(1e4),
        {"rope_theta": 1e4},
    ),
    "mixtral": Model(
        "Mixtral", "mixtral", SIZES | {"num_local_experts": 4, "experts_implementation": "eager"} | _rotary(1e6),
        {"rope_theta": 1e6}, {"model.layers.*.block_sparse_moe": "model.layers.*.mlp"},
        _experts("block_sparse_moe", "mlp"), ("float32",),
    ),
    "qwen3_moe": Model(
        "Qwen3Moe", "qwen3_moe",
        SIZES | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                 "mlp_only_layers": [], "norm_topk_prob": True, "experts_implementation": "eager"} | _rotary(1e6),
        {"rope_theta": 1e6, "num_experts": 4}, parts=_experts("mlp", "mlp"), dtypes=("float32",),
    ),
}  # fmt: skip
