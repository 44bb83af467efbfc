"""What a port's run is given: it takes what is computed, and says what to go on with.

NumPy is all that is needed here: a port that brings its own packages runs in a process that has no more of ours.
"""

import sys
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MOST = 10000
"""Names that nobody asked for are remembered up to so many."""
Held = tuple[np.ndarray, str]
"""An array as a tap holds it, float32 or int32, and the name of the dtype that it was computed in."""


@dataclass(eq=False)
class Probe:
    """Records a run under the taps' names, and steers it.

    Attributes:
        names: the taps that are wanted; others may be recorded and are dropped.
        force: what is to be gone on with at these taps.
        given: the exact values to go on with, by their names in `inputs/`; empty where the run goes its own way.
        splits: the oracle's sequence, where the run is steered: role, mode, ids, grid and clean_frames of each.
        answer: index of an answer's first token in it; None where nothing is answered.
        taps, exact: what has been recorded.
        unknown: names that were told and that nobody asked for, in order, and where each was told first, as FILE:LINE.
        absent: for taps of which the port lacks rows, which of the oracle's rows those are; they broadcast to the tap.
        progress: told the name of each call before it runs.
        attached: makes a context in which code can be attached to from outside: see attach.Attached.
    """

    names: Container[str]
    force: Mapping[str, Held] = field(default_factory=dict)
    given: Mapping[str, np.ndarray] = field(default_factory=dict)
    splits: tuple[Any, ...] = ()
    answer: int | None = None
    progress: Callable[[str], None] = lambda call: None
    attached: Callable[[], Any] | None = None
    taps: dict[str, Held] = field(default_factory=dict)
    exact: dict[str, np.ndarray] = field(default_factory=dict)
    absent: dict[str, np.ndarray] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    _calls: Mapping[str, np.ndarray] | None = None
    _told: set[str] = field(default_factory=set)

    def call(self, rows: Mapping[str, Any]) -> None:
        """Say which calls of the oracle's what follows belongs to.

        Args:
            rows: for each call the port's rows that are the oracle's, in the oracle's order; -1
                for a row that the port has not. Rows of the port's that are in no call are its own affair.

        Raises ValueError for rows that are no integers of at least -1.
        """
        if not isinstance(rows, Mapping):
            raise ValueError(f"probe.call is given {type(rows).__name__}: give {{call: rows}}")
        found = {name: np.asarray(places) for name, places in rows.items()}
        for name, places in found.items():
            if places.ndim != 1 or (places.size and (places.dtype.kind not in "iu" or places.min() < -1)):
                raise ValueError(f"the rows of {name} are no list of row numbers, -1 for one that is not there")
        for name in found.keys() - (self._calls or {}).keys():
            self.progress(name)
        self._calls = {name: places.astype(np.intp) for name, places in found.items()}
        # A port that computes the sequence anew in each step tells its prefix anew.
        self._told = set()

    def rows(self, path: str, array: Any, of: Any = None, axis: int = 0, axes: tuple[int, ...] = ()) -> Any:
        """Record a module's output in all current calls and return what to go on with, as the same kind of array.

        Args:
            path: the module's path in the checkpoint, or what the table of taps calls a value.
            array: an array of NumPy, MLX or PyTorch.
            of: which of the port's rows this tap is about, as booleans, such as those of one expert; None for all.
            axis: the axis of the rows, in the tap.
            axes: the array's axes in the order in which the tap has them, where that is another; those that the tap
                has not, such as a batch axis, have length 1 and are left out.
        """
        taken, dtype = _taken(array, path)
        layout = _Layout(taken.shape, axes, path)
        taken = layout.of_tap(taken)
        count = taken.shape[axis] if -taken.ndim <= axis < taken.ndim else 0
        mask = None if of is None else np.asarray(of)
        if mask is not None and (mask.dtype != bool or mask.shape != (count,)):
            raise ValueError(f"{path}: of is {mask.dtype} {list(mask.shape)}, not a boolean for each of {count} rows")
        steered = False
        if self._calls is None:
            raise ValueError(f"probe.rows({path!r}) comes before any probe.call, which says whose rows these are")
        for call, places in self._calls.items():
            if places.size and places.max() >= count:
                raise ValueError(f"{call}/{path}: row {places.max()} was named in probe.call, the array has {count}")
            if mask is not None:
                places = places[(places < 0) | mask[places]]
            if not len(places) or np.all(places < 0):
                continue
            name, there = f"{call}/{path}", places >= 0
            self._note(name)
            mine = np.take(taken, np.maximum(places, 0), axis) if name in self.names else None
            if mine is not None and name in self._told and name not in self.force:
                _require_same(name, self.taps[name][0], mine)
            self._told.add(name)
            if mine is not None and name not in self.taps:
                self.taps[name] = mine, dtype
                if not there.all():
                    # As many axes as the tap has, to be laid over it.
                    self.absent[name] = np.expand_dims(~there, [i for i in range(taken.ndim) if i != axis])
            if name in self.force:
                if not steered:
                    taken, steered = taken.copy(), True
                given = np.compress(there, self.force[name][0], axis)
                index = (slice(None),) * axis
                taken[(*index, places[there])] = given.reshape(taken[(*index, places[there])].shape)
        return _like(array, layout.of_port(taken)) if steered else array

    def value(self, name: str, array: Any, axes: tuple[int, ...] = ()) -> Any:
        """Record a whole tap, such as sampler.x_t1 or latent, and return what to go on with; `axes` as for rows."""
        self._note(name)
        layout = _Layout(np.shape(array), axes, name)
        if name in self.names and not (name in self.taps and name in self.force):
            taken, dtype = _taken(array, name)
            told = self.taps.setdefault(name, (np.array(layout.of_tap(taken)), dtype))
            _require_same(name, told[0], layout.of_tap(taken))
        return _like(array, layout.of_port(self.force[name][0])) if name in self.force else array

    def next(self, name: str, number: int) -> int:
        """Record one more integer of a tap that grows, such as tokens, and return what to go on with."""
        self._note(name)
        before = self.taps.get(name, (np.zeros(0, np.int32), ""))[0]
        self.taps[name] = np.append(before, np.int32(number)), "int32"
        given = self.force[name][0] if name in self.force else ()
        return int(given[len(before)]) if len(before) < len(given) else number

    def integers(self, name: str, array: Any, shared: Any = None) -> np.ndarray:
        """Record what must be equal, integers or times, under its name in `inputs/`, and return what to go on with.

        `shared` tells, as booleans, which of the oracle's values along the last axis the port has; None for all.
        """
        name, found = f"inputs/{name}", np.array(array)
        self._note(name)
        if found.dtype.kind not in "iubf":
            raise ValueError(f"{name} is {found.dtype}: give integers or times")
        if shared is not None and np.asarray(shared).sum() != (found.shape[-1] if found.ndim else -1):
            raise ValueError(f"{name}: shared names {int(np.asarray(shared).sum())} values, there are {found.shape}")
        given, told = self.given.get(name), found.astype(np.float32 if found.dtype.kind == "f" else np.int32)
        if given is None:
            _require_same(name, self.exact.get(name, told), told)
        self.exact.setdefault(name, told)
        if shared is not None:
            self.absent[name] = ~np.asarray(shared, bool)
        return found if given is None else given[..., slice(None) if shared is None else shared].copy()

    def _note(self, name: str) -> None:
        """Remember a name that nobody asked for: it may be misspelt."""
        if name not in self.names and name not in self.unknown and len(self.unknown) < MOST:
            frame = sys._getframe()
            while frame.f_back is not None and frame.f_code.co_filename == __file__:
                frame = frame.f_back
            self.unknown[name] = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _require_same(name: str, before: np.ndarray, now: np.ndarray) -> None:
    """Raise ValueError where a name is told again, of another value: which of the two counts?"""
    if not np.array_equal(before.ravel(), now.ravel(), equal_nan=True):
        raise ValueError(f"{name} is told twice, of different values: give each call or step its own name")


def told_weights(port: Any) -> Iterator[tuple[str, np.ndarray]]:
    """A port's weights one by one, float32; raises ValueError for what is no name with an array, or is told twice."""
    seen = set()
    for item in getattr(port, "weights", tuple)():
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise ValueError(f"weights() yields {type(item).__name__}: yield (name, array)")
        name, array = item
        if np.asarray(array).dtype.kind not in "iubf":
            raise ValueError(f"weight {name} is {type(array).__name__}: yield a NumPy array")
        if name in seen:
            raise ValueError(f"weight {name} is told twice")
        seen.add(name)
        yield name, np.asarray(array, np.float32)


@contextmanager
def replaced_weights(port: Any, given: Mapping[str, np.ndarray]) -> Iterator[None]:
    """A context in which a port that can load weights holds the given ones, and then those that it told before."""
    load = getattr(port, "load_weights", None)
    if load is None:
        yield
        return
    before = {name: np.array(array) for name, array in told_weights(port) if name in given}
    try:
        load({name: given[name] for name in before})
        yield
    finally:
        load(before)


class _Layout:
    """How a port's array lies in memory, and how its tap does."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[int, ...], name: str) -> None:
        rest = [axis for axis in range(len(shape)) if axes and axis not in axes]
        if len({*axes}) != len(axes) or not {*axes} <= {*range(len(shape))} or any(shape[axis] != 1 for axis in rest):
            raise ValueError(f"{name}: axes {list(axes)} are no order of the axes of {list(shape)}")
        self._order = [*rest, *(axes or range(len(shape)))]
        self._whole = tuple(shape[axis] for axis in self._order)
        self._tap = self._whole[len(rest) :]

    def of_tap(self, array: np.ndarray) -> np.ndarray:
        """The port's array as the tap has it."""
        return array.transpose(self._order).reshape(self._tap)

    def of_port(self, array: np.ndarray) -> np.ndarray:
        """The tap's array as the port has it."""
        return array.reshape(self._whole).transpose(np.argsort(self._order))


def _taken(array: Any, name: str) -> Held:
    """An array of any kind as a tap holds it; raises ValueError for what is none."""
    dtype = str(getattr(array, "dtype", "")).rpartition(".")[2]
    if not dtype or (dtype not in ("float32", "bfloat16", "bool") and not dtype.startswith(("int", "uint"))):
        what = dtype or type(array).__name__
        raise ValueError(f"{name} is {what}: give an array of float32, bfloat16 or integers, cast to one of these")
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
