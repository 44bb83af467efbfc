"""What a porter says of a pair of models: a trusted one of PyTorch, a port of it to MLX, and what both are given."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from parity.errors import ParityError
from parity.python_file import failure, import_file

DTYPES = ("float32", "bfloat16")

Call = Callable[[str], None]
"""Begins a part of a run that is told apart by its name, such as "prefill" or "decode0"."""
Run = Callable[[Any, Any, Call], object]
"""Runs a model: given it, the pair's inputs and what begins a call. The first array of what it returns is compared."""


def _run_torch(model: nn.Module, inputs: Mapping[str, np.ndarray], call: Call) -> object:
    given = {name: None if array is None else torch.from_numpy(array) for name, array in inputs.items()}
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    # Floats are those of the model, as the pair's caller has NumPy's alone.
    return model(**{name: t.to(dtype) if t is not None and t.is_floating_point() else t for name, t in given.items()})


def _run_mlx(model: Any, inputs: Mapping[str, np.ndarray], call: Call) -> object:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    floats = (each.dtype for _, each in tree_flatten(model.parameters()) if mx.issubdtype(each.dtype, mx.floating))
    dtype = next(floats, mx.float32)
    given = [None if array is None else mx.array(array) for array in inputs.values()]
    return model(*(x.astype(dtype) if x is not None and mx.issubdtype(x.dtype, mx.floating) else x for x in given))


def _check_inputs(inputs: Any) -> None:
    """Raise ParityError for inputs that runs which are not the pair's own could not be given to both models."""
    if not isinstance(inputs, Mapping):
        raise ParityError(f"the inputs are a {type(inputs).__name__}: name NumPy arrays, or say how to run both models "
                          "in run_trusted and run_port")  # fmt: skip
    for name, array in inputs.items():
        if array is not None and not isinstance(array, np.ndarray):
            raise ParityError(f"input {name!r} is a {type(array).__name__}: give a NumPy array")
        if array is not None and array.dtype == np.float64:
            raise ParityError(f"input {name!r} is float64, which MLX does not compute in: {name}.astype(np.float32)")


Place = tuple[Any, str]
"""What holds a function, and the attribute that it is."""


@dataclass(frozen=True)
class Part:
    """A part of a trusted parameter: the number-th of so many equal ones along an axis, as of fused experts."""

    of: str
    number: int
    count: int
    axis: int = 0


@dataclass(frozen=True)
class Pair:
    """A trusted model and its port, holding the same weights.

    Attributes:
        trusted: the PyTorch model, in eval mode.
        port: the MLX model.
        inputs: NumPy arrays by name, or whatever the runs take.
        also: further inputs, by what they are called, such as "a batch" or "beyond the window"; each is run where those
            before it agree.
        run_trusted, run_port: run a model on the inputs; by default the trusted one is given them by name, the port in
            their order.
        names: paths in the port and what they are called in the trusted model, where the two differ: the beginnings of
            paths, with a `*` for any one part of them. A tuple of trusted paths stands for their outputs (and the rows
            of their weights) one behind the other, as of a fused projection.
        parts: paths of parameters of the port, again with a `*` for any one part of them, that are a part of a trusted
            parameter.
        functions: what is no module, by a name of yours: its owner and attribute in the trusted code and in the port's,
            such as `{"route": ((theirs, "route_tokens"), (ours, "route"))}`. The first array that it is given and the
            first that it returns are compared.
        lacks: patterns (fnmatch) of trusted or port paths that have no counterpart on purpose.
    """

    trusted: nn.Module
    port: Any
    inputs: Any
    run_trusted: Run = _run_torch
    run_port: Run = _run_mlx
    names: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)
    functions: Mapping[str, tuple[Place, Place]] = field(default_factory=dict)
    lacks: Sequence[str] = ()
    also: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import mlx.nn

        for inputs in (self.inputs, *self.also.values()) if self.run_trusted is _run_torch else ():
            _check_inputs(inputs)
        for what, model, kind in (("trusted", self.trusted, nn.Module), ("port", self.port, mlx.nn.Module)):
            if not isinstance(model, kind):
                library = "PyTorch" if what == "trusted" else "MLX"
                raise ParityError(f"the {what} model is a {type(model).__name__} and no module of {library}")

    def trusted_paths(self, path: str) -> tuple[str, ...]:
        """What a path of the port is called in the trusted model; several where it holds several parts."""
        best, length = (path,), 0
        for pattern, theirs in self.names.items():
            found = _beginning(pattern, path)
            if found is not None and (depth := pattern.count(".") + 1) > length:
                length, (stars, rest) = depth, found
                several = (theirs,) if isinstance(theirs, str) else theirs
                best = tuple(".".join([*_filled(name, stars), *rest]) for name in several)
        return best

    def part(self, path: str) -> Part | None:
        """The part of a trusted parameter that a parameter of the port is; None for what is one by itself."""
        for pattern, part in self.parts.items():
            found = _beginning(pattern, path)
            if found is not None and not found[1]:
                return replace(part, of=".".join(_filled(part.of, found[0])))
        return None


def _beginning(pattern: str, path: str) -> tuple[list[str], list[str]] | None:
    """What the stars of a pattern stand for in a path that begins as it does, and the rest of that."""
    ours, parts = pattern.split("."), path.split(".")
    if len(ours) > len(parts) or any(a not in ("*", b) for a, b in zip(ours, parts, strict=False)):
        return None
    return [part for a, part in zip(ours, parts, strict=False) if a == "*"], parts[len(ours) :]


def _filled(pattern: str, stars: Sequence[str]) -> list[str]:
    left = iter(stars)
    return [next(left, part) if part == "*" else part for part in pattern.split(".") if part]


def load_pair(path: Path, dtype: str = "float32") -> Pair:
    """The pair that a Python file makes in `pair(dtype)`, or holds; raises ParityError where it holds none or fails."""
    if dtype not in DTYPES:
        raise ParityError(f"dtype {dtype!r} cannot be compared: choose one of {', '.join(DTYPES)}")
    module = import_file(path, "a function pair(dtype) that returns a parity.Pair")
    made = getattr(module, "pair", None)
    if callable(made):
        try:
            made = made(dtype) if signature(made).parameters else made()
        except (Exception, SystemExit) as error:
            raise failure(f"{path}: pair() failed", error, path) from error
    if not isinstance(made, Pair):
        raise ParityError(f"{path} makes no pair: let its function pair(dtype) return a parity.Pair")
    return made
