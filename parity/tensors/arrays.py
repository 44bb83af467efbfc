"""Arrays of NumPy, PyTorch and MLX as taps."""

from typing import Any

import numpy as np
import torch

from parity.errors import ParityError
from parity.tensors.recording import Tap
from parity.tensors.sketch import Sketch

_INT32 = np.iinfo(np.int32)


def tap_of(value: Any, name: str = "array") -> Tap | Sketch:
    """Hold an array of NumPy, PyTorch or MLX as a tap; integers become int32.

    Raises ParityError for a dtype that would lose something.
    """
    if isinstance(value, Tap | Sketch):
        return value
    dtype = dtype_of(value)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if dtype == "bfloat16" else value).numpy()
    elif type(value).__module__.startswith("mlx."):
        import mlx.core as mx

        value = np.array(value.astype(mx.float32) if dtype == "bfloat16" else value)
    array = np.asarray(value)
    if dtype == "bfloat16":
        return Tap(np.ascontiguousarray(array, np.float32), "bfloat16")
    if array.dtype == np.float32:
        return Tap(array, "float32")
    if array.dtype.kind not in "iub":
        raise ParityError(f"{name} is {array.dtype}: cast it to float32, bfloat16 or int32, which can be compared")
    if array.size and not (_INT32.min <= array.min() and array.max() <= _INT32.max):
        raise ParityError(f"{name} holds integers that int32 cannot: they cannot be compared")
    return Tap(array.astype(np.int32), "int32")


def dtype_of(value: Any) -> str:
    """The name of an array's or a tap's dtype, without its library's; integers are held as int32 whatever they were."""
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    name = str(dtype).rpartition(".")[2]
    return "int32" if name.startswith(("int", "uint", "bool")) else name
