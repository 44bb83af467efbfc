"""PyTorch's pickled state dicts, read without PyTorch and without running what they name."""

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lance_mlx.checkpoint.safetensors import StoredTensor, TensorInfo, Tensors
from lance_mlx.errors import LanceError
from lance_mlx.files import opened

_STORAGES = {"FloatStorage": "float32", "BFloat16Storage": "bfloat16", "HalfStorage": "float16"}
_LOCAL_HEADER = 30
"""Bytes before the name in the header of a member of a zip file."""
_BLOCK = 1 << 22


class _Storage(NamedTuple):
    dtype: str
    key: str
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuilt(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _TensorsOnly(pickle.Unpickler):
    """Makes descriptions of tensors and plain containers; whatever else a file names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name.endswith("Storage"):
            # PyTorch saves the class of a storage, which says its dtype.
            return _STORAGES.get(name, f"torch.{name}")
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no tensor and was not run")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid
        if kind != "storage" or not (isinstance(dtype, str) and isinstance(key, str) and isinstance(size, int)):
            raise pickle.UnpicklingError("it refers to something that is not a tensor")
        return _Storage(dtype, key, size)


def read_pth(path: Path) -> Tensors:
    """The tensors of a state dict that torch.save wrote, by name, none of them read.

    Raises:
        LanceError: the file is missing or not such a state dict, or holds another dtype than TensorInfo has.
    """
    with _readable(path):
        with opened(path) as file, zipfile.ZipFile(file) as archive:
            members = {member.filename: member for member in archive.infolist()}
            (root,) = {name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")}
            if f"{root}byteorder" in members and archive.open(f"{root}byteorder").read(16) != b"little":
                raise ValueError("it is big-endian")
            state = _TensorsOnly(archive.open(f"{root}data.pkl")).load()
            if not isinstance(state, dict) or not all(
                isinstance(name, str) and isinstance(value, _Tensor) for name, value in state.items()
            ):
                raise LanceError(f"{path} does not hold a flat dict of tensors")
            return {name: _stored(path, name, tensor, root, members, file) for name, tensor in state.items()}


def check_pth(path: Path) -> None:
    """Read a file that torch.save wrote to its end and raise LanceError where it is not what its checksums say.

    One of 0 was never computed, as PyTorch can be told.
    """
    with _readable(path), opened(path) as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            with archive.open(member) as stored:
                while member.CRC and stored.read(_BLOCK):
                    pass


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise LanceError(f"{path} is missing") from None
    except LanceError:
        raise
    except Exception as error:  # pickle and zipfile raise many kinds for truncated, foreign and hostile files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LanceError(f"{path} is not a readable PyTorch state dict ({reason}): copy it again") from None


def _stored(
    path: Path, name: str, tensor: _Tensor, root: str, members: dict[str, zipfile.ZipInfo], file: BinaryIO
) -> StoredTensor:
    storage = tensor.storage
    if storage.dtype not in _STORAGES.values():
        raise LanceError(f"{path}: tensor '{name}' is {storage.dtype}; float32, bfloat16 or float16 is expected")
    info, member = TensorInfo(storage.dtype, tensor.shape), members[f"{root}data/{storage.key}"]
    width = TensorInfo(storage.dtype, ()).nbytes
    expected, stride = [], 1
    for size in reversed(tensor.shape):
        expected.insert(0, stride)
        stride *= size
    if any(size != 1 and a != b for size, a, b in zip(tensor.shape, tensor.strides, expected, strict=True)):
        raise LanceError(f"{path}: tensor '{name}' is not contiguous: save it again after .contiguous()")
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != storage.size * width:
        raise ValueError(f"tensor '{name}' is compressed or cut off")
    if min(tensor.shape, default=1) < 0 or not 0 <= tensor.offset <= storage.size - math.prod(tensor.shape):
        raise ValueError(f"tensor '{name}' reaches beyond its storage")
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER)
    start = member.header_offset + _LOCAL_HEADER
    start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return StoredTensor(path, name, info, start + tensor.offset * width, tensor.shape)
