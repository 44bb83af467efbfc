"""mlx-lm's Gemma 3 (windows, two rotary bases) against transformers': a prompt and three tokens more, with caches."""

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.models import gemma3_text
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from parity.pairs import Pair, copy_weights

PROMPT, DECODED = 24, 3
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 512,
    # Shorter than the prompt, so that the windows show.
    "sliding_window": 16,
}


def run_trusted(model, ids, call):
    call("prefill")
    output = model(torch.from_numpy(ids[:, :PROMPT]), use_cache=True)
    for step in range(DECODED):
        call(f"decode{step}")
        token = torch.from_numpy(ids[:, PROMPT + step :][:, :1])
        output = model(token, past_key_values=output.past_key_values)
    return output


def run_port(model, ids, call):
    cache = model.make_cache()
    call("prefill")
    logits = model(mx.array(ids[:, :PROMPT]), cache=cache)
    for step in range(DECODED):
        call(f"decode{step}")
        logits = model(mx.array(ids[:, PROMPT + step :][:, :1]), cache=cache)
    return logits


def pair(dtype: str) -> Pair:
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 2
    rotary = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    }
    config = Gemma3TextConfig(**SIZES, layer_types=kinds, rope_parameters=rotary, tie_word_embeddings=True)
    trusted = Gemma3ForCausalLM(config).eval()
    for parameter in trusted.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    trusted = trusted.to(getattr(torch, dtype))
    port = gemma3_text.Model(gemma3_text.ModelArgs("gemma3_text", **SIZES, sliding_window_pattern=2))
    port.sanitize({})  # its head is the embedding
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (1, PROMPT + DECODED))
    made = Pair(trusted, port, ids, run_trusted, run_port)
    copy_weights(made)
    return made
