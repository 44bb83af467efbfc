"""A denoising step of the PyTorch reference, for bench.py and bench_parity.py."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference.arms import build_arms
from reference.model import Lance, Pipeline
from reference.numerics import Numerics
from reference.request import Request
from reference.sampler import Arm

CHECKPOINT = Path(__file__).parents[1] / "oracles" / "checkpoint-a"
VARIANT = "Lance_3B"


@dataclass(frozen=True)
class Drawing:
    """A picture under way: a pipeline, its arms behind cached prefixes, and a state with the time of every latent."""

    pipeline: Pipeline
    arms: list[Arm]
    x_t: Tensor
    timestep: Tensor

    def step(self) -> None:
        """Compute every arm's velocity."""
        for arm in self.arms:
            arm.velocity(0, self.x_t, self.timestep)
        if self.x_t.is_cuda:
            torch.cuda.synchronize()


def drawing(
    sizes: Mapping[str, Any], prompt: str, latents: int, dtype: str, guidance: float, device: str = "cpu"
) -> Drawing:
    """A picture of so many latent cells; `sizes` change the small configuration, whose weights are then random."""
    # A CPU multiplies bfloat16 faster in float32.
    numerics = Numerics(dtype, linear="float32" if device == "cpu" else "native")
    pipeline = Pipeline.load(CHECKPOINT, VARIANT, numerics, device)
    if sizes:
        torch.manual_seed(0)
        with torch.device(device):
            model = Lance(replace(pipeline.model.config, **sizes), numerics)
        model = model.to(numerics.torch_dtype).eval().requires_grad_(False)
        pipeline = replace(pipeline, model=model)
    side = 16 * round(latents**0.5)
    request = Request.from_dict(
        {"task": "t2i", "spec": prompt, "height": side, "width": side, "num_frames": 1, "num_steps": 1}
        | {"cfg_text_scale": guidance, "cfg_interval": [0.4, 1.0], "cfg_renorm_type": "global", "cfg_renorm_min": 0.0}
        | {"timestep_shift": 3.5, "text_template": True}
    )
    inputs = pipeline.inputs(pipeline.layout(request, []))
    x_t = torch.randn(latents, 48, generator=torch.Generator().manual_seed(0)).to(device, numerics.torch_dtype)
    arms = [arm for arm in build_arms(inputs, request, "kv_cache", x_t) if arm is not None]
    for arm in arms:
        for index in range(arm.prefixes):
            arm.prefill(index)
    return Drawing(pipeline, arms, x_t, torch.full((latents,), 0.5, device=device))
