"""README.md of a converted checkpoint, as model hubs show it."""

from collections import Counter

from lance_mlx.checkpoint.recipe import Plan
from lance_mlx.requests.request import Variant

_TASKS = {Variant.IMAGE: "t2i, image_edit, subject and x2t_image", Variant.VIDEO: "t2v, i2v, video_edit and x2t_video"}
_EXAMPLE = {
    Variant.IMAGE: 't2i --model DIR --prompt "A tabby cat." --output cat.png',
    Variant.VIDEO: 't2v --model DIR --prompt "A red bird flies." --output bird.mp4',
}
_CARD = """---
license: apache-2.0
library_name: mlx
base_model: bytedance-research/Lance
pipeline_tag: {pipeline}
tags:
- mlx
- lance
---

# {variant}, {kind}, for MLX

The `{variant}` checkpoint of [bytedance-research/Lance](https://huggingface.co/bytedance-research/Lance), converted by
`lance-mlx convert` from `{source}`. It serves {tasks}.

    lance-mlx generate {example}

{tensors}, {rounding}. Names are the official
ones; the VAE's begin with `vae.` and have their channels last. `config.json` holds the architecture,
`conversion_report.json` the origin and the SHA-256 of every tensor before and after. The stored position table is left
out: it is computed.

Lance is by ByteDance, the VAE Wan 2.2's by Alibaba, the ViT Qwen2.5-VL's by Alibaba; all are under Apache-2.0.
"""


def model_card(variant: Variant, dtype: str, source: str, quantized: Plan) -> str:
    """The text of the card; `source` is what was converted."""
    kind, tensors = dtype, f"Every tensor is {dtype}, norms included"
    if quantized:
        counts = Counter(map(str, quantized.values()))
        kind = f"{dtype} and quantized"
        packed = ", ".join(f"{count} at {scheme}" for scheme, count in counts.most_common())
        tensors = f"Quantized are {len(quantized)} weights: {packed}. Every other tensor is {dtype}, norms included"
    return _CARD.format(
        pipeline="text-to-video" if variant is Variant.VIDEO else "text-to-image",
        variant=variant,
        kind=kind,
        tensors=tensors,
        source=source,
        tasks=_TASKS[variant],
        example=_EXAMPLE[variant],
        rounding="as upstream's launcher runs it" if dtype == "bfloat16" else "so that nothing is rounded",
    )
