"""The port of a pair, recorded and given other values to go on with."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from parity.pairs.layouts import laid_out, put_back
from parity.pairs.names import parse
from parity.pairs.pair import Pair
from parity.pairs.sides import IN, OUTPUT, QKV, SDPA, Side, arrays, replaced, tapped
from parity.pairs.torch_side import TorchSide
from parity.ports.attach import Attached
from parity.tensors.arrays import tap_of
from parity.tensors.recording import Tap
from parity.tensors.rounding import rounded

# Factors that are no other than rounding makes them; how near two lengths of queries have to be to be of one scale.
SAME, ALIKE = 1e-6, 0.1


class MlxSide(Side):
    """An MLX model, whose modules' classes are wrapped for as long as it runs.

    Attributes:
        more: results of parts, or of further calls of them, that the trusted model has none of, by name.
        moved: outputs whose channels stand elsewhere than the trusted model's.
        wider: taps that are float32 where the trusted model's are bfloat16; they are rounded to be held against those.
    """

    def __init__(self, pair: Pair, trusted: TorchSide, force: Mapping[str, Tap]) -> None:
        super().__init__(force)
        self._pair, self._expected, self._given_there = pair, trusted.taps, trusted.given
        self.moved: list[str] = []
        self.more: dict[str, np.ndarray] = {}
        self.wider: list[str] = []

    def run(self) -> "MlxSide":
        """Run the pair's port."""
        import mlx.core as mx

        paths = {id(module): path for path, module in self._pair.port.named_modules() if path}
        kinds = {type(module): None for _, module in self._pair.port.named_modules()}
        called: list[Any] = [None]

        def call(original: Callable, module: Any, *args: Any, **values: Any) -> Any:
            path = paths.get(id(module))
            if path is None or module is called[-1]:
                return original(module, *args, **values)
            called.append(module)
            self._path.append(path)
            names = self._names(path)
            try:
                args, values = self._first(names, args, values)
                output = original(module, *args, **values)
            finally:
                self._path.pop()
                called.pop()
            return replaced(output, lambda array: self._seen(names, array), mx.array)

        # What is compiled is run as it is written: its parts cannot be looked at otherwise.
        mx.disable_compile()
        with ExitStack() as stack:
            stack.callback(mx.enable_compile)
            attached = stack.enter_context(Attached())
            for kind in kinds:
                attached.wrap(kind, "__call__", call)
            attached.wrap(mx.fast, "scaled_dot_product_attention", self._attend)
            for name, (_, (owner, attribute)) in self._pair.functions.items():
                attached.wrap(owner, attribute, partial(self._function, name))
            output = self._pair.run_port(self._pair.port, self._pair.inputs, self.begin)
            self._output(dict(arrays(output, mx.array)))
        return self

    def _output(self, found: dict[str, Any]) -> None:
        """What the run returned: by name where the trusted model's is, else by place."""
        names = [name for name in self._expected if name.partition("/")[2].startswith(OUTPUT)]
        own = [f"{self._call}/{name}" for name in found]
        for name, array in zip(own if set(own) <= set(names) else names, found.values(), strict=False):
            if not mx_floating(array):
                self.taps[name] = tap_of(array)
            self._seen([name], array)

    def _names(self, path: str) -> list[str]:
        """The trusted names of what a part of the port makes now."""
        return [self.name(theirs) for theirs in self._pair.trusted_paths(path)]

    def _first(self, names: list[str], args: tuple, values: dict) -> tuple[tuple, dict]:
        if args and _is_array(args[0]):
            return (self._seen([f"{names[0]}{IN}"], args[0]), *args[1:]), values
        return args, values

    def _function(self, said: str, original: Callable, *args: Any, **values: Any) -> Any:
        import mlx.core as mx

        (theirs, *_) = self._pair.trusted_paths(self._path[-1])
        names = [self.name(f"{theirs}.{said}".lstrip("."))]
        args, values = self._first(names, args, values)
        return replaced(original(*args, **values), lambda array: self._seen(names, array), mx.array)

    def _attend(self, original: Callable, *args: Any, **values: Any) -> Any:
        named = dict(zip(("q", "k", "v"), args, strict=False)) | values
        (theirs, *_) = self._pair.trusted_paths(self._path[-1])
        name = self.name(f"{theirs}.{SDPA}".lstrip("."))
        factor = self._scaled_before(name, named)
        named["q"] = named["q"] * factor
        for short in QKV:
            named[short] = self._seen([f"{name}:{short}"], named[short])
        named["q"] = named["q"] / factor
        queries, keys, values_ = (named.pop(short) for short in QKV)
        return self._seen([name], original(queries, keys, values_, **named))

    def _scaled_before(self, name: str, named: Mapping[str, Any]) -> float:
        """What queries are to be multiplied by to be the trusted model's, where the two share the scale of the scores
        between queries and attention in another way; else 1."""
        import mlx.core as mx

        there, queries = self._given_there.get(name), self._expected.get(f"{name}:q")
        own = named.get("scale")
        if there is None or queries is None or own is None:
            return 1.0
        own, q = float(own), named["q"].astype(mx.float32)
        factor = own / (there[1].get("scale") or queries.shape[-1] ** -0.5)
        lengths = float(mx.sqrt(mx.mean(q * q))) * factor, float(np.sqrt(np.mean(np.square(queries.array))))
        return factor if abs(factor - 1) > SAME and abs(lengths[0] - lengths[1]) <= ALIKE * lengths[1] else 1.0

    def _seen(self, names: list[str], array: Any) -> Any:
        """Record an array under the trusted names of its parts, in the trusted layout; what to go on with."""
        import mlx.core as mx

        if not mx_floating(array):
            return array
        wanted = [self._expected[name] for name in names if name in self._expected]
        held = tapped(array)
        if len(wanted) < len(names):
            self.more[names[0]] = held.array
            return array
        ends = np.cumsum([tap.shape[-1] for tap in wanted])[:-1]
        parts = np.split(held.array, ends, axis=-1) if len(names) > 1 else [held.array]
        for name, part, tap in zip(names, parts, wanted, strict=True):
            there = laid_out(part, tap.array)
            of_run = parse(name).path.startswith(OUTPUT)
            if of_run and there is not None and not np.array_equal(there.ravel(), part.ravel(), equal_nan=True):
                self.moved.append(name)
            there = np.ascontiguousarray(part if there is None else there)
            dtype = held.dtype
            if (dtype, tap.dtype) == ("float32", "bfloat16"):
                there, dtype = rounded(there, "bfloat16"), "bfloat16"
                self.wider.append(name)
            self.taps[name] = Tap(there, dtype)
        if not all(name in self._force for name in names):
            return array
        given = [put_back(self._force[name].array, part) for name, part in zip(names, parts, strict=True)]
        if any(part is None for part in given):
            return array
        return mx.array(np.concatenate(given, -1)).astype(array.dtype)


def mx_floating(array: Any) -> bool:
    """Whether an array is of floats."""
    import mlx.core as mx

    return mx.issubdtype(array.dtype, mx.floating)


def _is_array(value: Any) -> bool:
    import mlx.core as mx

    return isinstance(value, mx.array)
