"""Laws of the sampler and of the sequence that a localization of a broken port comes to."""

from dataclasses import replace

import numpy as np

from lance_mlx.sampling import flow
from lance_mlx.sequence import prompt
from lance_mlx.sequence.segments import AttentionMode
from parity.lance.faults.base import Fault, function, wrapped


def _weaker(original, cond, uncond, request):
    return original(cond, uncond, replace(request, guidance_scale=3.2))


def _one_row_short(original, role, mode, grid, *rest):
    segment = original(role, mode, grid, *rest)
    if mode is not AttentionMode.NOISE:
        return segment
    return replace(segment, ids=np.delete(segment.ids, range(1, 1 + grid[2])))


def test_a_guidance_scale_that_nobody_wrote_down_is_told_with_its_number(localized):
    fault = Fault(
        "weaker",
        "The guidance scale is 3.2.",
        "guidance",
        lambda target: wrapped(flow, "guided_velocity", _weaker),
    )
    (finding,) = localized("t2i-fp32-kv", fault).findings
    assert finding.explanations[0].name == "the guidance scale is 3.2"


def test_a_row_of_cells_that_is_missing_is_told_of_its_block(localized):
    fault = Fault("short", "A row is missing.", "sequence", function(prompt, "_visual_block", _one_row_short))
    finding = localized("t2i-fp32-kv", fault).findings[0]
    assert finding.explanations[0].name == "the target has 1 row of cells too few"
    assert {"inputs/modality", "inputs/split_lens"} <= set(finding.also)
