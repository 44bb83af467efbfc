"""Lance, as the engine asks for it: every name here is one that parity.model.definition() may be asked."""

import json
from pathlib import Path

from parity.lance.components import component_of
from parity.lance.derive import derive, require_consistent
from parity.lance.diagnosis import name_component
from parity.lance.faults import CATALOGUE, PROFILES, load_fault
from parity.lance.given import answered, wanted
from parity.lance.hypotheses import HYPOTHESES
from parity.lance.map import ARMS, PARTS, arm_of, axes_within
from parity.lance.names import RESULTS, locate, logits_name, parse, velocity_calls
from parity.lance.ports import PORTS, oracle_weights
from parity.lance.quantized import quantized_bundle
from parity.lance.ranks.port import ranks_port
from parity.lance.requests import SUPPORTED_TASKS, check_request
from parity.lance.rows import row_experts, row_frames, row_roles
from parity.lance.training.check import check_training, is_training
from parity.lance.training.localize import localize_training
from parity.lance.trusted import (
    SEQUENCE,
    answer_logits,
    cut,
    drawn_visuals,
    exact_of,
    load_run,
    load_trusted,
    load_wider,
    run_passes,
    visuals_of,
)
from parity.lance.variants import exact_variant, run_variant, variants_for
from parity.lance.weight_sums import changed, checkpoint_sum, has_weights, require_checkpoint

CONFIDENCE = json.loads(Path(__file__).with_name("confidence.json").read_text(encoding="utf-8"))
"""How many explanations were right and told, by sort and kind of component; see parity/localize/confidence.py."""

__all__ = [
    # Names of taps, and requests.
    "parse",
    "RESULTS",
    "locate",
    "logits_name",
    "velocity_calls",
    "check_request",
    "SUPPORTED_TASKS",
    # The trusted side: the reference loaded for a bundle, its runs, its variants, and what it lays down as exact.
    "load_trusted",
    "load_run",
    "load_wider",
    "run_passes",
    "cut",
    "exact_of",
    "SEQUENCE",
    "answer_logits",
    "visuals_of",
    "drawn_visuals",
    "variants_for",
    "exact_variant",
    "run_variant",
    # A bundle: what a run of it is given and records, its checkpoint, what can be derived of it.
    "answered",
    "wanted",
    "quantized_bundle",
    "ranks_port",
    "oracle_weights",
    "require_checkpoint",
    "changed",
    "checkpoint_sum",
    "derive",
    "require_consistent",
    "has_weights",
    # Bundles of training, which are judged by themselves.
    "is_training",
    "check_training",
    "localize_training",
    # What the rows of a tap are, and what a divergence is called.
    "row_roles",
    "row_experts",
    "row_frames",
    "name_component",
    "component_of",
    # How reports lay the model out, and what they call its parts.
    "PARTS",
    "ARMS",
    "arm_of",
    "axes_within",
    # Ports, hypotheses, and faults to try both on.
    "PORTS",
    "HYPOTHESES",
    "CONFIDENCE",
    "CATALOGUE",
    "PROFILES",
    "load_fault",
]
