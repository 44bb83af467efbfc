"""Which pass of the language model is running: what faults of experts and masks ask for."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import Any

import mlx.core as mx

from lance_mlx.model.mot import ExpertRows
from lance_mlx.sampling import flow
from lance_mlx.sampling.conditions import GuidanceArm
from parity.lance.faults.base import wrapped


class Pass(Enum):
    """What a pass computes: a run of text (one answer token included) or a visual block."""

    TEXT = "text"
    VIT = "vit"
    CLEAN = "clean"
    NOISE = "noise"

    @property
    def holds_latents(self) -> bool:
        """Whether the generation expert takes part."""
        return self in (Pass.CLEAN, Pass.NOISE)


@contextmanager
def watched() -> Iterator[Callable[[], Pass]]:
    """Yield a function that tells which pass is running."""
    running = [Pass.TEXT]

    def velocities(original: Callable, *args: Any) -> list[mx.array]:
        running[0] = Pass.NOISE
        return original(*args)

    def extend(original: Callable, arm: GuidanceArm, rows: ExpertRows, rotary: Any, causal: bool) -> ExpertRows:
        if rows.gen is not None:
            running[0] = Pass.CLEAN
        else:
            running[0] = Pass.TEXT if causal else Pass.VIT
        return original(arm, rows, rotary, causal)

    with ExitStack() as stack:
        stack.enter_context(wrapped(flow, "velocities_of_pass", velocities))
        stack.enter_context(wrapped(GuidanceArm, "extend", extend))
        yield lambda: running[0]
