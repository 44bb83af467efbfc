"""What a port of Lance may do instead of what upstream does."""

from parity.hypotheses.base import Hypothesis, check_unique
from parity.lance.hypotheses import (
    attention,
    dtypes,
    embeddings,
    experts,
    generic,
    guidance,
    layers,
    norms,
    places,
    positions,
    quantization,
    resizing,
    rope,
    sampling,
    sequence,
    vae,
    vae_layers,
    vae_stages,
    vision,
    vision_attention,
    weights,
)

# Of two that explain something equally well the earlier one is shown: what says most about the cause comes first.
HYPOTHESES: list[Hypothesis] = check_unique(
    [
        hypothesis
        for module in (
            positions,
            sequence,
            resizing,
            experts,
            attention,
            rope,
            norms,
            layers,
            places,
            embeddings,
            guidance,
            sampling,
            vision,
            vision_attention,
            vae_layers,
            vae_stages,
            vae,
            quantization,
            weights,
            dtypes,
            generic,
        )
        for hypothesis in module.HYPOTHESES
    ]
)
