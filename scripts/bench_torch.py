"""A denoising step of the PyTorch reference with random weights, for bench.py."""

from collections.abc import Callable
from dataclasses import replace

import torch

from lance_mlx.config import LanceConfig
from reference.arms import build_arms
from reference.model import Lance, Pipeline
from reference.numerics import Numerics
from reference.request import Request


def guided_step(config: LanceConfig, prompt: str, latents: int, dtype: str) -> Callable[[], None]:
    """What computes both arms of a step of a picture of so many latent cells, behind cached prefixes."""
    from bench_cases import CHECKPOINT

    pipeline = Pipeline.load(CHECKPOINT.parent, CHECKPOINT.name, Numerics(dtype))
    names = "hidden_size intermediate_size num_attention_heads num_key_value_heads num_hidden_layers mrope_section"
    sizes = {name: getattr(config, name) for name in names.split()}
    torch.manual_seed(0)
    model = Lance(replace(pipeline.model.config, **sizes), pipeline.numerics)
    pipeline = replace(pipeline, model=model.to(pipeline.numerics.torch_dtype).eval().requires_grad_(False))
    side = 16 * round(latents**0.5)
    request = Request.from_dict(
        {"task": "t2i", "spec": prompt, "height": side, "width": side, "num_frames": 1, "num_steps": 1}
        | {"cfg_text_scale": 4.0, "cfg_interval": [0.4, 1.0], "cfg_renorm_type": "global", "cfg_renorm_min": 0.0}
        | {"timestep_shift": 3.5, "text_template": True}
    )
    inputs = pipeline.inputs(pipeline.layout(request, []))
    x_t = torch.randn(latents, 48, generator=torch.Generator().manual_seed(0)).to(pipeline.numerics.torch_dtype)
    timestep = torch.full((latents,), 0.5)
    arms = [arm for arm in build_arms(inputs, request, "kv_cache", x_t) if arm is not None]
    for arm in arms:
        for index in range(arm.prefixes):
            arm.prefill(index)

    def run() -> None:
        for arm in arms:
            arm.velocity(0, x_t, timestep)

    return run
