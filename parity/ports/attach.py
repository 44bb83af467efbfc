"""Attaching to code from outside: functions wrapped, local variables looked at, until a context ends.

Needs nothing but Python: it serves ports in processes of their own too.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pkgutil import resolve_name
from typing import Any


def owner_of(path: str) -> tuple[Any, str]:
    """The module or class that holds a function, and its name there, of "module:function" or "module:Class.method"."""
    module, _, names = path.partition(":")
    owner, _, name = names.rpartition(".")
    return resolve_name(f"{module}:{owner}" if owner else module), name


class Attached:
    """Context manager that undoes at its end whatever was attached in it.

    Attributes:
        path: of the module that is being called, of those that `modules` was given; empty where none is.
    """

    def __init__(self) -> None:
        self._stack, self.path = ExitStack(), ""
        self._called: Any = None

    def __enter__(self) -> "Attached":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Replace a method of a class or a function of a module by `wrapper(original, *arguments)`."""
        held = vars(owner).get(name)
        original = getattr(owner, name)

        def wrapped(*args: Any, **values: Any) -> Any:
            return wrapper(original, *args, **values)

        setattr(owner, name, staticmethod(wrapped) if isinstance(held, staticmethod) else wrapped)
        if name in vars(owner) and held is not None:
            self._stack.callback(setattr, owner, name, held)
        else:
            self._stack.callback(delattr, owner, name)

    def returned(self, owner: Any, name: str, then: Callable[[Any], Any]) -> None:
        """Go on with `then(output)` in the place of what a method of a class or a function of a module returns."""
        self.wrap(owner, name, lambda original, *args, **values: then(original(*args, **values)))

    def modules(self, named: Iterable[tuple[str, Any]], then: Callable[[str, Any], Any]) -> None:
        """Go on with `then(path, output)` in the place of what modules of MLX or PyTorch return.

        Args:
            named: a path and a module each, such as those of `named_modules()`.
        """
        modules = [(path, module) for path, module in named]
        paths = {id(module): path for path, module in modules}

        def called(original: Callable[..., Any], module: Any, *args: Any, **values: Any) -> Any:
            path, before = paths.get(id(module)), (self.path, self._called)
            # Also one whose class calls that which it is derived from is seen once.
            if path is None or module is self._called:
                return original(module, *args, **values)
            self.path, self._called = path, module
            try:
                output = original(module, *args, **values)
            finally:
                self.path, self._called = before
            return then(path, output)

        for kind in {type(module): None for _, module in modules}:
            self.wrap(kind, "__call__", called)

    def watch(self, function: Callable[..., Any], bound: Mapping[str, Callable[[Any, dict[str, Any]], Any]]) -> None:
        """Look at local variables of a function each time that one holds another object.

        What is computed inline has no call to wrap; its arrays can still be recorded, and others put in their place.

        Args:
            bound: for each variable what is called then, with its value and all the function's variables. What it
                returns, unless that is None, is copied into the value, an array of as many elements.
        """
        code, last, before = function.__code__, {}, sys.gettrace()

        def line(frame: Any, event: str, argument: Any) -> Callable:
            around = frame.f_locals
            for name in bound.keys() & around.keys():
                value = around[name]
                if last.get(name) is not value:
                    last[name] = value
                    instead = bound[name](value, around)
                    if instead is not None:
                        value[...] = instead.reshape(value.shape)
            return line

        sys.settrace(lambda frame, event, argument: line if frame.f_code is code else None)
        self._stack.callback(sys.settrace, before)
