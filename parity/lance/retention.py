"""What is kept of a request as it runs: taps whole, or sketches of what is larger than its sketch."""

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from parity.lance.names import parse
from parity.lance.rows import row_roles
from parity.tensors.recording import Recording, Tap, to_tap
from parity.tensors.sketch import BUCKETS, Sketch, runs_of, sketch_tensor
from reference.layout import Layout

# What a replay is given, and the times, whose values say which steps are guided.
_NEEDED = re.compile(r"sampler\.(noise|timestep\d+)|vae\.encode\d+\.eps|tokens")


Retention = Callable[[str, Tensor], Tap | Sketch]
"""Makes of a tap's name and tensor what is recorded."""


def keep_whole(name: str, tensor: Tensor) -> Tap:
    """Keep all of a tap."""
    return to_tap(tensor)


class RetentionPolicy:
    """Decides as a request runs what is kept of each tap.

    Args:
        layout: the request's sequence, which says whose the rows of a tap are.
        whole: fnmatch patterns of names, or of components, that are kept whole.
        smallest: elements for each group of rows up to which a tap is kept whole; by default a sketch is no smaller.
    """

    def __init__(self, layout: Layout, whole: Sequence[str], smallest: int = 2 * BUCKETS) -> None:
        self._layout, self._whole, self._smallest = layout, whole, smallest

    def __call__(self, name: str, tensor: Tensor) -> Tap | Sketch:
        """What is to be kept of a tap; a sketch is made where the tensor lies."""
        if not tensor.is_floating_point() or _NEEDED.fullmatch(name):
            return to_tap(tensor)
        tap = parse(name)
        if any(fnmatchcase(name, pattern) or fnmatchcase(tap.component, pattern) for pattern in self._whole):
            return to_tap(tensor)
        rows = tensor.shape[0] if tensor.ndim else 1
        runs = runs_of(row_roles(tap, rows, self._layout), rows)
        if tensor.numel() <= self._smallest * len({label for label, _ in runs}):
            return to_tap(tensor)
        return sketch_tensor(tensor if tensor.dtype == torch.bfloat16 else tensor.float(), runs)


def parted(kept: Mapping[str, Tap | Sketch]) -> tuple[Recording, dict[str, Sketch]]:
    """What is kept whole, and the sketches."""
    sketches = {name: value for name, value in kept.items() if isinstance(value, Sketch)}
    return {name: value for name, value in kept.items() if name not in sketches}, sketches
