"""What a port's run is given: it takes what is computed, and says what to go on with.

NumPy is all that is needed here: a port that brings its own packages runs in a process that has no more of ours.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Held = tuple[np.ndarray, str]
"""An array as a tap holds it, float32 or int32, and the name of the dtype that it was computed in."""


@dataclass(eq=False)
class Probe:
    """Records a run under the taps' names, and steers it.

    Attributes:
        names: the taps that are wanted; others may be recorded and are dropped.
        force: what is to be gone on with at these taps.
        contract: the exact values to go on with, by their names in `inputs/`; empty where the run goes its own way.
        splits: the oracle's sequence, where the run is steered: role, mode, ids, grid and clean_frames of each.
        answer: index of an answer's first token in it; None where nothing is answered.
        taps, exact: what has been recorded.
        absent: for taps of which the port lacks rows, which of the oracle's rows those are; they broadcast to the tap.
        progress: told the name of each call before it runs.
        attached: makes a context in which code can be attached to from outside: see attach.Attached.
    """

    names: Container[str]
    force: Mapping[str, Held] = field(default_factory=dict)
    contract: Mapping[str, np.ndarray] = field(default_factory=dict)
    splits: tuple[Any, ...] = ()
    answer: int | None = None
    progress: Callable[[str], None] = lambda call: None
    attached: Callable[[], Any] | None = None
    taps: dict[str, Held] = field(default_factory=dict)
    exact: dict[str, np.ndarray] = field(default_factory=dict)
    absent: dict[str, np.ndarray] = field(default_factory=dict)
    _calls: Mapping[str, np.ndarray] = field(default_factory=dict)

    def call(self, rows: Mapping[str, Any]) -> None:
        """Say which calls of the oracle's what follows belongs to.

        Args:
            rows: for each call, such as cond.step0, the port's rows that are the oracle's, in the oracle's order; -1
                for a row that the port has not. Rows of the port's that are in no call are its own affair.
        """
        for name in rows.keys() - self._calls.keys():
            self.progress(name)
        self._calls = {name: np.asarray(places, np.intp) for name, places in rows.items()}

    def rows(self, path: str, array: Any, of: Any = None, axis: int = 0) -> Any:
        """Record a module's output in all current calls and return what to go on with, as the same kind of array.

        Args:
            path: the module's path in the checkpoint, or what the table of taps calls a value.
            array: an array of NumPy, MLX or PyTorch without a batch axis, or with one of length 1 in front.
            of: which of the port's rows this tap is about, as booleans, such as those of one expert; None for all.
            axis: the axis of the rows.
        """
        taken, dtype = _taken(array)
        steered = False
        for call, places in self._calls.items():
            if of is not None:
                places = places[(places < 0) | np.asarray(of)[places]]
            if not len(places) or np.all(places < 0):
                continue
            name, there = f"{call}/{path}", places >= 0
            if name in self.names and name not in self.taps:
                self.taps[name] = np.take(taken, np.maximum(places, 0), axis), dtype
                if not there.all():
                    # As many axes as the tap has, to be laid over it.
                    self.absent[name] = np.expand_dims(~there, [i for i in range(taken.ndim) if i != axis])
            if name in self.force:
                if not steered:
                    taken, steered = taken.copy(), True
                given = np.compress(there, self.force[name][0], axis)
                index = (slice(None),) * axis
                taken[(*index, places[there])] = given.reshape(taken[(*index, places[there])].shape)
        return _like(array, taken) if steered else array

    def value(self, name: str, array: Any) -> Any:
        """Record a whole tap, such as sampler.x_t1 or latent, and return what to go on with."""
        if name in self.names and name not in self.taps:
            taken, dtype = _taken(array)
            self.taps[name] = np.array(taken), dtype
        return _like(array, self.force[name][0].reshape(np.shape(array))) if name in self.force else array

    def integers(self, name: str, array: Any, shared: Any = None) -> np.ndarray:
        """Record what must be equal, integers or times, under its name in `inputs/`, and return what to go on with.

        `shared` tells, as booleans, which of the oracle's values along the last axis the port has; None for all.
        """
        name, found = f"inputs/{name}", np.array(array)
        self.exact.setdefault(name, found.astype(np.float32 if found.dtype.kind == "f" else np.int32))
        if shared is not None:
            self.absent[name] = ~np.asarray(shared, bool)
        given = self.contract.get(name)
        return found if given is None else given[..., slice(None) if shared is None else shared].copy()


def _taken(array: Any) -> Held:
    """An array of any kind as a tap holds it."""
    dtype = str(array.dtype).rpartition(".")[2]
    if type(array).__module__.startswith("torch"):
        array = array.detach().cpu().float() if dtype == "bfloat16" else array.detach().cpu()
    elif dtype == "bfloat16":
        import mlx.core as mx

        array = array.astype(mx.float32)
    found = np.asarray(array)
    if found.dtype.kind in "iub":
        return found.astype(np.int32), "int32"
    return np.ascontiguousarray(found, np.float32), dtype


def _like(array: Any, value: np.ndarray) -> Any:
    """A value as an array of the same kind and dtype as another."""
    kind = type(array).__module__
    if kind.startswith("mlx"):
        import mlx.core as mx

        return mx.array(value).astype(array.dtype)
    if kind.startswith("torch"):
        import torch

        return torch.from_numpy(np.array(value)).to(array)
    return np.asarray(value, array.dtype)
