"""What recording either model of a pair has in common: the names of taps, and what is seen of an output.

A tap is called CALL/PATH, what a module makes; CALL/PATH:in, what it reads; CALL/PATH.sdpa, what attention makes inside
the module at PATH, and CALL/PATH.sdpa:q (k, v), what it reads; CALL/output, what the run returns. A further call of the
same part has #1, #2, ... behind.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from parity.tensors.arrays import dtype_of, tap_of
from parity.tensors.recording import Recording, Tap

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
        calls: the names that were begun, in order.
    """

    def __init__(self, force: Mapping[str, Tap] | None = None) -> None:
        self.taps: Recording = {}
        self.given: dict[str, tuple[tuple, dict[str, Any]]] = {}
        self.calls: list[str] = []
        self._force = force or {}
        self._call, self._path = "run", [""]
        self._counts: Counter[str] = Counter()

    def begin(self, call: str) -> None:
        """Name what follows."""
        self._call = call
        self.calls.append(call)
        self._counts.clear()

    def name(self, path: str) -> str:
        """The name of what a part makes now; each is asked for once a call of the part."""
        count = self._counts[path]
        self._counts[path] += 1
        return f"{self._call}/{path}" + (f"#{count}" if count else "")


def tapped(array: Any) -> Tap:
    """An array of either library as a tap; one of float16 or float64 as one of float32."""
    if dtype_of(array) in ("float16", "float64"):
        import mlx.core as mx

        array = array.float() if isinstance(array, torch.Tensor) else array.astype(mx.float32)
    return tap_of(array)


def replaced(output: Any, seen: Callable[[Any], Any], kind: type) -> Any:
    """An output with the first array in it seen; what is no array and holds none is left as it is."""
    if isinstance(output, kind):
        return seen(output)
    if isinstance(output, tuple | list) and output and isinstance(output[0], kind):
        made = [seen(output[0]), *output[1:]]
        return type(output)(*made) if hasattr(output, "_fields") else type(output)(made)
    return output


def arrays(output: Any, kind: type, name: str = OUTPUT) -> Iterator[tuple[str, Any]]:
    """The arrays in what a run returned, each by OUTPUT and the keys or places behind it that lead there."""
    if isinstance(output, kind):
        yield name, output
    elif isinstance(output, Mapping):
        for key, each in output.items():
            yield from arrays(each, kind, f"{name}.{key}")
    elif isinstance(output, list | tuple):
        for place, each in enumerate(output):
            yield from arrays(each, kind, name if place == 0 and name == OUTPUT else f"{name}.{place}")
