"""The trusted model of a pair, recorded and given other values to go on with."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from parity.pairs.pair import Pair
from parity.pairs.sides import IN, QKV, ROTARY, SDPA, Side, arrays, replaced, tapped
from parity.pairs.written_out import Attended, WrittenOut
from parity.ports.attach import Attached
from parity.tensors.arrays import tap_of
from parity.tensors.recording import Tap


class TorchSide(Side):
    """A PyTorch model, watched by hooks; `inputs` are the arrays that its run was given, by name.

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
        self._wide, self._attend, self._attending = wide, attend, False
        self.inputs: dict[str, Tensor] = {}

    def run(self, pair: Pair, model: nn.Module | None = None) -> "TorchSide":
        """Run the pair's trusted model, or another instance of it."""
        model = pair.trusted if model is None else model
        named = pair.inputs if isinstance(pair.inputs, Mapping) else {}
        self.inputs = {name: torch.from_numpy(a) for name, a in named.items() if isinstance(a, np.ndarray)}
        with ExitStack() as stack, torch.no_grad():
            for path, module in model.named_modules():
                if path:
                    self._watch(stack, path, module)
            attached = stack.enter_context(self._attention())
            for name, ((owner, attribute), _) in pair.functions.items():
                attached.wrap(owner, attribute, partial(self._function, name))
            with WrittenOut(self._written_out):
                output = pair.run_trusted(model, pair.inputs, self.begin)
            for name, tensor in arrays(output, Tensor):
                self._seen(f"{self._call}/{name}", tensor)
                if not tensor.is_floating_point():
                    self.taps[f"{self._call}/{name}"] = tap_of(tensor)
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
            return replaced(output, lambda tensor: self._seen(name, tensor), Tensor)

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
        self.taps[name] = tapped(tensor)
        forced = self._force.get(name)
        return tensor if forced is None else torch.from_numpy(forced.array).to(tensor.dtype).reshape(tensor.shape)

    @contextmanager
    def _attention(self) -> Iterator[Attached]:
        """Watches PyTorch's attention, and the function that turns queries and keys, wherever a library has it."""

        with Attached() as attached:
            attached.wrap(
                nn.functional,
                "scaled_dot_product_attention",
                lambda _, *args, **values: self._attended(dict(zip(_NAMED, args, strict=False)) | values),
            )
            for module in {id(m): m for m in list(sys.modules.values()) if _holds(m, ROTARY)}.values():
                attached.wrap(module, ROTARY, self._turned)
            yield attached

    def _attended(self, named: dict[str, Any], output: Tensor | None = None) -> Tensor:
        """Attention seen, with what is to be gone on with; `output` is what it was computed to be, if it was."""
        name = self.name(f"{self._path[-1]}.{SDPA}".lstrip("."))
        for short, key in zip(QKV, _NAMED, strict=False):
            seen = self._seen(f"{name}:{short}", named[key])
            output = output if seen is named[key] else None
            named[key] = seen
        self.given[name] = (), named
        if output is None:
            self._attending = True
            output = self._attend(**named)
            self._attending = False
        return self._seen(name, output)

    def _written_out(self, found: Attended) -> Tensor:
        # What computes attention here may itself write it out.
        if self._attending:
            return found.output
        return self._attended(dict(zip(_NAMED, found[:3], strict=False)) | found.values, found.output)

    def _function(self, said: str, original: Callable, *args: Any, **values: Any) -> Any:
        name = self.name(f"{self._path[-1]}.{said}".lstrip("."))
        args, values = self._first(f"{name}{IN}", args, values)
        self.given[name] = args, values
        return replaced(original(*args, **values), lambda tensor: self._seen(name, tensor), Tensor)

    def _turned(self, original: Callable, *args: Any, **values: Any) -> Any:
        self.given[self.name(f"{self._path[-1]}.{ROTARY}".lstrip("."))] = args, values
        return original(*args, **values)


_NAMED = ("query", "key", "value", "attn_mask")


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _holds(module: Any, name: str) -> bool:
    return callable(vars(module).get(name)) if isinstance(getattr(module, "__dict__", None), dict) else False
