"""The vision tower against transformers, with the same random weights."""

import numpy as np
import pytest
import torch

from reference.config import VisionConfig
from reference.numerics import Numerics
from reference.vit import VisionTower

BOUND = 2e-5
SIZES = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": (1, 3),
}
# A window is 4 x 4 tokens: one that is filled, some that are cut off, several frames.
IMAGE, WIDE, TALL, TINY, VIDEO = (1, 16, 16), (1, 6, 26), (1, 30, 4), (1, 2, 2), (3, 10, 12)


def towers(sizes: dict) -> tuple[torch.nn.Module, VisionTower]:
    """transformers' tower with seeded random weights, and the reference's with the same."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLVisionConfig(**sizes | {"fullatt_block_indexes": list(sizes["fullatt_block_indexes"])})
    config._attn_implementation = "eager"
    theirs = Qwen2_5_VisionTransformerPretrainedModel(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, parameter in theirs.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        norm = name.endswith(("norm1.weight", "norm2.weight", "ln_q.weight"))
        wide = parameter.ndim > 1
        weights[name] = 1 + 0.2 * values if norm else values * parameter[0].numel() ** -0.5 if wide else 0.1 * values
    theirs.load_state_dict(weights, strict=False)
    ours = VisionTower(VisionConfig(**sizes), Numerics("float32")).eval()
    ours.load_state_dict(weights)
    return theirs, ours


@pytest.mark.parametrize(
    ("changes", "cases"),
    [
        ({}, [[IMAGE], [WIDE], [TALL], [VIDEO], [TINY], [WIDE, VIDEO, IMAGE, TALL]]),
        ({"window_size": 56, "fullatt_block_indexes": ()}, [[VIDEO, WIDE]]),
    ],
    ids=["small", "windows-only"],
)
@torch.inference_mode()
def test_transformers_computes_the_same(changes, cases):
    theirs, ours = towers(SIZES | changes)
    for grids in cases:
        count = sum(t * h * w for t, h, w in grids)
        patches = torch.from_numpy(np.random.default_rng(count).standard_normal((count, 1176), np.float32))
        expected = theirs(patches, grid_thw=torch.tensor(grids))
        expected = getattr(expected, "pooler_output", expected)
        found = ours(patches, grids)
        assert found.shape == expected.shape
        assert float((found - expected).norm() / expected.norm()) <= BOUND, grids
