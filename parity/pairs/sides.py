"""Running both models of a pair while what their parts read and make is recorded, and given other values to go on with.

A tap is called CALL/PATH, what a module makes; CALL/PATH:in, what it reads; CALL/PATH.sdpa, what attention makes inside
the module at PATH, and CALL/PATH.sdpa:q (k, v), what it reads. A further call of the same part has #1, #2, ... behind.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from parity.pairs.pair import Pair
from parity.ports.attach import Attached
from parity.tensors.arrays import dtype_of, tap_of
from parity.tensors.recording import Recording, Tap
from parity.tensors.rounding import rounded

IN = ":in"
OUTPUT = "output"
SDPA, QKV = "sdpa", "qkv"
# What libraries call the function that turns queries and keys by their positions.
ROTARY = "apply_rotary_pos_emb"


class Side:
    """What is common to both: the call and the path of the moment, and what was recorded.

    Attributes:
        taps: what was computed, by name, in order.
        given: of every part the arguments that it was called with, by name of its output's tap.
    """

    def __init__(self, force: Mapping[str, Tap] | None = None) -> None:
        self.taps: Recording = {}
        self.given: dict[str, tuple[tuple, dict[str, Any]]] = {}
        self._force = force or {}
        self._call, self._path = "run", [""]
        self._counts: Counter[str] = Counter()

    def begin(self, call: str) -> None:
        """Name what follows."""
        self._call = call
        self._counts.clear()

    def name(self, path: str) -> str:
        """The name of what a part makes now; each is asked for once a call of the part."""
        count = self._counts[path]
        self._counts[path] += 1
        return f"{self._call}/{path}" + (f"#{count}" if count else "")


class TorchSide(Side):
    """A PyTorch model, watched by hooks.

    Args:
        force: values to go on with at taps.
        wide: whether it is one of float64, whose parts are given all floats as such.
        attend: what computes attention in the place of PyTorch's own function.
    """

    def __init__(
        self,
        force: Mapping[str, Tap] | None = None,
        wide: bool = False,
        attend: Callable[..., Tensor] = nn.functional.scaled_dot_product_attention,
    ) -> None:
        super().__init__(force)
        self._wide, self._attend = wide, attend

    def run(self, pair: Pair, model: nn.Module | None = None) -> "TorchSide":
        """Run the pair's trusted model, or another instance of it."""
        model = pair.trusted if model is None else model
        with ExitStack() as stack, torch.no_grad():
            for path, module in model.named_modules():
                if path:
                    self._watch(stack, path, module)
            stack.enter_context(self._attention())
            output = pair.run_trusted(model, pair.inputs, self.begin)
            self._seen(self.name(OUTPUT), next(_arrays(output, Tensor), None))
        return self

    def _watch(self, stack: ExitStack, path: str, module: nn.Module) -> None:
        names: list[str] = []

        def enter(module: nn.Module, args: tuple, values: dict) -> tuple[tuple, dict]:
            name = self.name(path)
            names.append(name)
            self._path.append(path)
            args, values = self._first(f"{name}{IN}", args, values)
            if self._wide:
                args = tuple(v.double() if _is_float(v) else v for v in args)
                values = {key: v.double() if _is_float(v) else v for key, v in values.items()}
            self.given[name] = args, values
            return args, values

        def leave(module: nn.Module, args: tuple, output: Any) -> Any:
            self._path.pop()
            name = names.pop()
            return _replaced(output, lambda tensor: self._seen(name, tensor), Tensor)

        handle = module.register_forward_pre_hook(enter, with_kwargs=True)
        stack.callback(handle.remove)
        stack.callback(module.register_forward_hook(leave).remove)

    def _first(self, name: str, args: tuple, values: dict) -> tuple[tuple, dict]:
        """The arguments with the first tensor of floats among them seen."""
        for index, value in enumerate(args):
            if _is_float(value):
                return (*args[:index], self._seen(name, value), *args[index + 1 :]), values
        for key, value in values.items():
            if _is_float(value):
                return args, {**values, key: self._seen(name, value)}
        return args, values

    def _seen(self, name: str, tensor: Any) -> Any:
        if not _is_float(tensor):
            return tensor
        self.taps[name] = _tap(tensor)
        forced = self._force.get(name)
        return tensor if forced is None else torch.from_numpy(forced.array).to(tensor.dtype).reshape(tensor.shape)

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """Watches PyTorch's attention, and the function that turns queries and keys, wherever a library has it."""

        def attend(*args: Any, **values: Any) -> Tensor:
            named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | values
            name = self.name(f"{self._path[-1]}.{SDPA}".lstrip("."))
            for short, key in zip(QKV, ("query", "key", "value"), strict=True):
                named[key] = self._seen(f"{name}:{short}", named[key])
            self.given[name] = (), named
            return self._seen(name, self._attend(**named))

        with Attached() as attached:
            attached.wrap(
                nn.functional, "scaled_dot_product_attention", lambda _, *args, **values: attend(*args, **values)
            )
            for module in {id(m): m for m in list(sys.modules.values()) if _holds(m, ROTARY)}.values():
                attached.wrap(module, ROTARY, self._turned)
            yield

    def _turned(self, original: Callable, *args: Any, **values: Any) -> Any:
        self.given[self.name(f"{self._path[-1]}.{ROTARY}".lstrip("."))] = args, values
        return original(*args, **values)


class MlxSide(Side):
    """An MLX model, whose modules' classes are wrapped for as long as it runs.

    Attributes:
        more: results of parts, or of further calls of them, that the trusted model has none of, by name.
        wider: taps that are float32 where the trusted model's are bfloat16; they are rounded to be held against those.
    """

    def __init__(self, pair: Pair, expected: Mapping[str, Tap], force: Mapping[str, Tap]) -> None:
        super().__init__(force)
        self._pair, self._expected = pair, expected
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
            return _replaced(output, lambda array: self._seen(names, array), mx.array)

        with Attached() as attached:
            for kind in kinds:
                attached.wrap(kind, "__call__", call)
            attached.wrap(mx.fast, "scaled_dot_product_attention", self._attend)
            output = self._pair.run_port(self._pair.port, self._pair.inputs, self.begin)
            self._seen([self.name(OUTPUT)], next(_arrays(output, mx.array), None))
        return self

    def _names(self, path: str) -> list[str]:
        """The trusted names of what a part of the port makes now."""
        return [self.name(theirs) for theirs in self._pair.trusted_paths(path)]

    def _first(self, names: list[str], args: tuple, values: dict) -> tuple[tuple, dict]:
        if args and _is_array(args[0]):
            return (self._seen([f"{names[0]}{IN}"], args[0]), *args[1:]), values
        return args, values

    def _attend(self, original: Callable, *args: Any, **values: Any) -> Any:
        named = dict(zip(("q", "k", "v"), args, strict=False)) | values
        (theirs, *_) = self._pair.trusted_paths(self._path[-1])
        name = self.name(f"{theirs}.{SDPA}".lstrip("."))
        for short in QKV:
            named[short] = self._seen([f"{name}:{short}"], named[short])
        queries, keys, values_ = (named.pop(short) for short in QKV)
        return self._seen([name], original(queries, keys, values_, **named))

    def _seen(self, names: list[str], array: Any) -> Any:
        """Record an array under the trusted names of its parts, in the trusted layout; what to go on with."""
        import mlx.core as mx

        if array is None or not mx.issubdtype(array.dtype, mx.floating):
            return array
        wanted = [self._expected[name] for name in names if name in self._expected]
        held = tap_of(array)
        if len(wanted) < len(names):
            self.more[names[0]] = held.array
            return array
        ends = np.cumsum([tap.shape[-1] for tap in wanted])[:-1]
        parts = np.split(held.array, ends, axis=-1) if len(names) > 1 else [held.array]
        for name, part, tap in zip(names, parts, wanted, strict=True):
            there = laid_out(part, tap.shape)
            there = np.ascontiguousarray(part if there is None else there)
            dtype = held.dtype
            if (dtype, tap.dtype) == ("float32", "bfloat16"):
                there, dtype = rounded(there, "bfloat16"), "bfloat16"
                self.wider.append(name)
            self.taps[name] = Tap(there, dtype)
        if not all(name in self._force for name in names):
            return array
        given = [put_back(self._force[name].array, part.shape) for name, part in zip(names, parts, strict=True)]
        if any(part is None for part in given):
            return array
        return mx.array(np.concatenate(given, -1)).astype(array.dtype)


def laid_out(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """A port's array as the trusted model lays it out: as it is, with channels first, each of a group of equal heads
    again or once, or without axes of one; None where none of these fits."""
    if array.ndim == len(shape) > 2 and array.shape != shape and np.moveaxis(array, -1, 1).shape == shape:
        return np.ascontiguousarray(np.moveaxis(array, -1, 1))
    return _in_groups(array, shape)


def put_back(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """A trusted array as a port lays it out; the reverse of laid_out."""
    if array.ndim == len(shape) > 2 and array.shape != shape and np.moveaxis(array, 1, -1).shape == shape:
        return np.ascontiguousarray(np.moveaxis(array, 1, -1))
    return _in_groups(array, shape)


def _in_groups(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """An array as it is or without axes of one; of four axes (batch, heads, n, d) with heads and n exchanged, with the
    heads of a group one behind the other, or in equal groups, once or again."""
    if _long(array.shape) == _long(shape):
        return array.reshape(shape)
    if array.ndim != 4 or len(shape) != 4 or not array.size or array.shape[::3] != shape[::3]:
        return None
    if array.shape[1:3] == (shape[2], shape[1]):
        return np.ascontiguousarray(array.swapaxes(1, 2))
    if array.size == int(np.prod(shape)):
        return array.reshape(shape)
    if array.shape[2] != shape[2]:
        return None
    heads, wanted = array.shape[1], shape[1]
    if wanted > heads:
        return np.repeat(array, wanted // heads, axis=1) if wanted % heads == 0 else None
    once = np.ascontiguousarray(array[:, :: heads // wanted]) if wanted and heads % wanted == 0 else None
    return once if once is not None and np.array_equal(np.repeat(once, heads // wanted, axis=1), array) else None


def _long(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(side for side in shape if side != 1)


def _replaced(output: Any, seen: Callable[[Any], Any], kind: type) -> Any:
    """An output with the first array in it seen; what is no array and holds none is left as it is."""
    if isinstance(output, kind):
        return seen(output)
    if isinstance(output, tuple | list) and output and isinstance(output[0], kind):
        made = [seen(output[0]), *output[1:]]
        return type(output)(*made) if hasattr(output, "_fields") else type(output)(made)
    return output


def _arrays(output: Any, kind: type) -> Iterator[Any]:
    """The arrays in what a run returned, in order."""
    if isinstance(output, kind):
        yield output
    elif isinstance(output, Mapping):
        yield from _arrays(list(output.values()), kind)
    elif isinstance(output, list | tuple):
        for each in output:
            yield from _arrays(each, kind)


def _tap(tensor: Tensor) -> Tap:
    """A tensor as a tap; what was computed wider than float32 to be more exact is rounded to that."""
    return tap_of(tensor.float() if dtype_of(tensor) in ("float64", "float16") else tensor)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_array(value: Any) -> bool:
    import mlx.core as mx

    return isinstance(value, mx.array)


def _holds(module: Any, name: str) -> bool:
    return callable(vars(module).get(name)) if isinstance(getattr(module, "__dict__", None), dict) else False
