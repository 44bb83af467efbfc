"""Faults written without knowing what the harness can explain: what it finds of them says more than its own catalogue.

They are not counted among the catalogue's; `load_fault` knows them by name.
"""

from parity.lance.faults.blind import (
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
from parity.lance.faults.blind.common import KINDS, BlindFault

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
