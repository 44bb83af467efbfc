"""mlx-lm's Qwen2 against transformers', with random weights: `lance-parity port examples/pair_qwen2.py`."""

import numpy as np
import torch
from mlx_lm.models import qwen2
from transformers import Qwen2Config, Qwen2ForCausalLM

from parity.pairs import Pair, copy_weights

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 512,
    "tie_word_embeddings": False,
}


def pair(dtype: str) -> Pair:
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    trusted = Qwen2ForCausalLM(config).eval()
    for parameter in trusted.parameters():
        # Biases and norms other than 0 and 1, so that one that is left out shows.
        parameter.data += 0.05 * torch.randn_like(parameter)
    trusted = trusted.to(getattr(torch, dtype))
    port = qwen2.Model(qwen2.ModelArgs("qwen2", **SIZES, rope_theta=1e6))
    made = Pair(trusted, port, {"input_ids": np.random.default_rng(0).integers(0, 512, (1, 24))})
    copy_weights(made)
    return made
