"""mlx-vlm's Qwen2.5-VL against transformers': a question about a picture, from its patches to the logits."""

import mlx.core as mx
import numpy as np
import torch
from mlx_vlm.models import qwen2_5_vl
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from parity.pairs import Pair, copy_weights

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 256,
    "tie_word_embeddings": False,
}
VISION = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "out_hidden_size": 64,
    "num_heads": 4,
    "fullatt_block_indexes": [1],
}
TOKENS = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}
# More than one window of 8 patches each way, the last of them not whole.
GRID = (1, 12, 20)
PATCH = 3 * 2 * 14 * 14


def run_trusted(model, inputs, call):
    ids, patches, grid = (torch.from_numpy(inputs[name]) for name in ("input_ids", "pixel_values", "grid"))
    dtype = next(model.parameters()).dtype
    # Which tokens are of pictures: the processor tells it.
    kinds = (ids == TOKENS["image_token_id"]).int()
    return model(input_ids=ids, pixel_values=patches.to(dtype), image_grid_thw=grid, mm_token_type_ids=kinds).logits


def run_port(model, inputs, call):
    ids, patches, grid = (mx.array(inputs[name]) for name in ("input_ids", "pixel_values", "grid"))
    return model(ids, pixel_values=patches, image_grid_thw=grid).logits


def pair(dtype: str) -> Pair:
    torch.manual_seed(0)
    mrope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": mrope}, vision_config=VISION, **TOKENS)
    trusted = Qwen2_5_VLForConditionalGeneration(config).eval()
    for parameter in trusted.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    trusted = trusted.to(getattr(torch, dtype))
    port = qwen2_5_vl.Model(
        qwen2_5_vl.ModelConfig(
            text_config=qwen2_5_vl.TextConfig(
                "qwen2_5_vl", **TEXT, rope_theta=1e6, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}
            ),
            vision_config=qwen2_5_vl.VisionConfig(**VISION),
            model_type="qwen2_5_vl",
            **TOKENS,
        )
    )
    random = np.random.default_rng(0)
    count = int(np.prod(GRID))
    picture = [
        TOKENS["vision_start_token_id"],
        *[TOKENS["image_token_id"]] * (count // 4),
        TOKENS["vision_end_token_id"],
    ]
    inputs = {
        "input_ids": np.array([[*random.integers(0, 250, 5), *picture, *random.integers(0, 250, 7)]]),
        "pixel_values": random.standard_normal((count, PATCH)).astype(np.float32),
        "grid": np.array([GRID]),
    }
    names = {
        "vision_tower": "model.visual",
        "language_model.model": "model.language_model",
        "language_model.lm_head": "lm_head",
    }
    made = Pair(trusted, port, inputs, run_trusted, run_port, names=names)
    copy_weights(made)
    return made
