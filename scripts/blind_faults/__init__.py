"""Faults written without knowing what the harness can explain: what it finds of them says more than its own catalogue.

They are no part of the package: scripts/blind_table.py tries them.
"""

from blind_faults import (
    attention,
    cache,
    embeddings,
    frames,
    mlp,
    norms,
    preprocess,
    rotary,
    sampler,
    sequence,
    vae,
    vision,
    weights,
)
from blind_faults.common import KINDS, BlindFault

_MODULES = (
    preprocess,
    vision,
    sequence,
    embeddings,
    norms,
    weights,
    rotary,
    cache,
    attention,
    mlp,
    sampler,
    vae,
    frames,
)
BLIND: list[BlindFault] = [fault for module in _MODULES for fault in module.FAULTS]
"""All of them, in the order of a run's stages."""

__all__ = ["BLIND", "KINDS", "BlindFault"]
