"""Messages with arrays between two processes: JSON, and the arrays' bytes behind it. Needs NumPy alone."""

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

_LENGTH = 8


class Channel:
    """One end of a pipe in each direction."""

    def __init__(self, incoming: BinaryIO, outgoing: BinaryIO) -> None:
        self._in, self._out = incoming, outgoing

    def send(self, message: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Send JSON values and arrays; raises OSError where the other end has gone."""
        held = {name: np.asarray(array, order="C") for name, array in (arrays or {}).items()}
        listed = [(name, array.dtype.str, array.shape) for name, array in held.items()]
        head = json.dumps({"message": message, "arrays": listed}).encode()
        self._out.write(len(head).to_bytes(_LENGTH, "little") + head)
        for array in held.values():
            self._out.write(array.reshape(-1).view(np.uint8).data)
        self._out.flush()

    def receive(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Wait for a message; raises EOFError where the other end has gone."""
        head = json.loads(self._read(int.from_bytes(self._read(_LENGTH), "little")))
        arrays = {}
        for name, dtype, shape in head["arrays"]:
            kind = np.dtype(dtype)
            count = int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(self._read(count * kind.itemsize), kind).reshape(shape)
        return head["message"], arrays

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        view, got = memoryview(data), 0
        while got < count:
            more = self._in.readinto(view[got:])
            if not more:
                raise EOFError("the other process has gone")
            got += more
        return data
