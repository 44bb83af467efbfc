"""Attaching to code from outside: functions wrapped, local variables looked at, until a context ends.

Needs nothing but Python: it serves ports in processes of their own too.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any


class Attached:
    """Context manager that undoes at its end whatever was attached in it."""

    def __init__(self) -> None:
        self._stack = ExitStack()

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

    def watch(self, function: Callable[..., Any], bound: Mapping[str, Callable[[Any, dict[str, Any]], None]]) -> None:
        """Look at local variables of a function each time that one holds another object.

        What is computed inline has no call to wrap; its arrays can still be recorded, and changed in place.

        Args:
            bound: for each variable what is called then, with its value and all the function's variables.
        """
        code, last, before = function.__code__, {}, sys.gettrace()

        def line(frame: Any, event: str, argument: Any) -> Callable:
            around = frame.f_locals
            for name in bound.keys() & around.keys():
                if last.get(name) is not around[name]:
                    last[name] = around[name]
                    bound[name](around[name], around)
            return line

        sys.settrace(lambda frame, event, argument: line if frame.f_code is code else None)
        self._stack.callback(sys.settrace, before)
