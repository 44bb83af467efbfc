"""What a run of training computed, whichever side ran it."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class TrainingRun:
    """What one side made of a bundle's pack, as float32 or int32 arrays under the bundle's names.

    Attributes:
        exact: integers, masks and times.
        outputs: taps and losses; behind "grad/" the gradient of the loss by each.
        gradients: the same by each parameter, before clipping.
        deltas: what a step changed, "step1/" and "step2/" before the parameter's name.
        rows: which rows of the pack's taps were computed at all, bool [L].
    """

    exact: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    rows: np.ndarray
    deltas: dict[str, np.ndarray] = field(default_factory=dict)
