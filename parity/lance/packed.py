"""A quantized checkpoint beside what it stands for: the official layout with the dequantized weights, which the
reference reads, and in a folder of its own what `lance-mlx convert -q` wrote, which lance_mlx runs."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from parity.bundle.reading import read_json
from parity.errors import ParityError, one_line
from parity.files import folder_beside
from parity.lance.dequantize import Packed, Scheme
from reference.model import VIT_FOLDER
from reference.numerics import Linear

FOLDER = "quantized"
"""Below the variant's folder: the checkpoint that lance_mlx runs."""
_INDEX = "model.safetensors.index.json"
_KEY = "quantization"
_VAE = "vae."


class PackedCheckpoint:
    """What `lance-mlx convert -q` wrote; raises ParityError where it did not.

    Attributes:
        schemes: how each module is packed, by path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config, index = (read_json(folder / name) for name in ("config.json", _INDEX))
        said, self._files = config.get(_KEY), index.get("weight_map")
        if not isinstance(said, dict) or not isinstance(self._files, dict):
            raise ParityError(f"{folder} is not quantized: name what lance-mlx convert -q wrote")
        self.variant, self.dtype = str(config.get("variant")), config.get("dtype")
        usual = {key: value for key, value in said.items() if not isinstance(value, dict)}
        paths = [name.removesuffix(".scales") for name in self._files if name.endswith(".scales")]
        with one_line(f"{folder}/config.json says not how its weights are packed"):
            self.schemes = {path: Scheme(**said.get(path, usual)) for path in paths}

    def packed(self, path: str) -> Packed:
        """The weight of a module."""
        scheme = self.schemes[path]
        parts = [self._read(f"{path}.{kind}") for kind in ("weight", "scales")]
        biases = self._read(f"{path}.biases").float().numpy() if scheme.mode == "affine" else None
        scales = parts[1].float().numpy() if scheme.mode == "affine" else parts[1].numpy()
        return Packed(scheme, parts[0].numpy(), scales, biases)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All but the VAE, as if nothing was packed, by their official names."""
        shapes = {}
        for name, file in self._files.items():
            path, _, kind = name.rpartition(".")
            if name.startswith(_VAE) or (path in self.schemes and kind in ("scales", "biases")):
                continue
            with self._opened(file) as tensors:
                *rows, width = tensors.get_slice(name).get_shape()
            packed = path in self.schemes and kind == "weight"
            shapes[name] = (*rows, width * 32 // self.schemes[path].bits if packed else width)
        return shapes

    def values(self, name: str) -> np.ndarray:
        """A tensor in float32, dequantized where it is packed."""
        path, _, kind = name.rpartition(".")
        if path in self.schemes and kind == "weight":
            return self.packed(path).dequantized()
        return self._read(name).float().numpy()

    def _read(self, name: str) -> Tensor:
        with self._opened(self._files[name]) as tensors:
            return tensors.get_tensor(name)

    @contextmanager
    def _opened(self, file: str) -> Iterator[safe_open]:
        with one_line(f"{self.folder} cannot be read"), safe_open(self.folder / file, "pt") as tensors:
            yield tensors


def run_folder(checkpoint: Path, variant: str) -> Path:
    """What lance_mlx runs of a checkpoint in the official layout: the packed weights, where there are any."""
    folder = checkpoint / variant
    return folder / FOLDER if (folder / FOLDER).is_dir() else folder


@cache
def packed_beside(checkpoint: Path, variant: str) -> PackedCheckpoint | None:
    """What a variant's dequantized weights were packed in; None for weights that were not."""
    folder = checkpoint / variant / FOLDER
    return PackedCheckpoint(folder) if folder.is_dir() else None


def note_packed(packed: PackedCheckpoint | None, model: nn.Module, prefix: str = "") -> None:
    """Let the linear layers of the reference, or of a part of it, know what they were packed in; see unrounded."""
    schemes = packed.schemes if packed else {}
    for path, module in model.named_modules(prefix=prefix):
        if path in schemes and isinstance(module, Linear):
            module.read_unrounded = cache(partial(_values, packed, f"{path}.weight"))


def _values(packed: PackedCheckpoint, name: str) -> Tensor:
    return torch.from_numpy(packed.values(name))


@contextmanager
def unrounded() -> Iterator[None]:
    """Multiply a single row with packed weights as they are, as MLX does, and not as the policy rounds them."""
    original = Linear.forward

    def forward(self: Linear, x: Tensor) -> Tensor:
        read = vars(self).get("read_unrounded")
        if read is None or len(x) != 1:
            return original(self, x)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.to(self.weight.dtype).float(), read(), bias).to(self.weight.dtype)

    with patch.object(Linear, "forward", forward):
        yield


def write_dequantized(out: Path, checkpoint: Path, variant: str, what: str, dtype: str) -> Path:
    """Write a checkpoint in the official layout whose weights are dequantized, the packed ones with it.

    Args:
        out: its folder, which must not be there.
        checkpoint: in the official layout, which is quantized, or was; the VAE, and a ViT that is not packed, are
            linked from there.
        what: bits, a recipe's name or JSON file, or the folder of a checkpoint that lance-mlx convert -q wrote.
        dtype: float32 or bfloat16, of what is not packed.

    Raises:
        ParityError: none of these, one that contradicts itself, or a checkpoint of another variant or dtype.
    """
    source = checkpoint / variant
    if not source.is_dir():
        raise ParityError(f"{checkpoint} is no checkpoint that holds {variant}: name one in the official layout")
    try:
        with folder_beside(out) as beside:
            folder = beside / variant
            folder.mkdir()
            if (Path(what) / "config.json").is_file():
                (folder / FOLDER).symlink_to(Path(what).resolve(), target_is_directory=True)
            else:
                _quantize(source, variant, what, dtype, folder / FOLDER)
            packed = PackedCheckpoint(folder / FOLDER)
            if (packed.variant, packed.dtype) != (variant, dtype):
                held = f"{what} holds {packed.variant} in {packed.dtype}"
                raise ParityError(f"{held}: this run needs {variant} in {dtype}")
            _write(folder / "model.safetensors", packed)
            for file in source.iterdir():
                if file.is_file() and file.suffix != ".safetensors":
                    shutil.copyfile(file, folder / file.name)
            for other in (VIT_FOLDER, "Wan2.2_VAE.pth"):
                if (checkpoint / other).exists():
                    (beside / other).symlink_to((checkpoint / other).resolve())
            os.rename(beside, out)
    except OSError as error:
        raise ParityError(f"{out} cannot be written: {error.strerror or error}") from error
    return out


def _write(path: Path, packed: PackedCheckpoint) -> None:
    from lance_mlx.checkpoint.safetensors import TensorInfo, to_bfloat16, write_safetensors

    half = packed.dtype == "bfloat16"

    def blocks(name: str) -> Iterator[np.ndarray]:
        values = np.ascontiguousarray(packed.values(name)).reshape(-1)
        yield to_bfloat16(values) if half else values

    infos = {name: TensorInfo(packed.dtype, shape) for name, shape in packed.shapes.items()}
    with path.open("wb") as file:
        write_safetensors(file, infos, blocks, {"format": "pt"})


def _quantize(source: Path, variant: str, what: str, dtype: str, out: Path) -> None:
    from lance_mlx.checkpoint.convert import prepare
    from lance_mlx.checkpoint.layouts import find_checkpoint
    from lance_mlx.checkpoint.tensors import ViTSource
    from lance_mlx.requests.request import Variant

    with one_line("it cannot be quantized"):
        how = dtype, 1 << 32, ViTSource.LANCE, recipe_named(what)
        prepare(what, find_checkpoint(source, Variant(variant)), out, *how).run(lambda total, done: lambda count: None)


def recipe_named(what: str) -> Any:
    """The recipe that a number of bits, a name or a file stands for; raises LanceError."""
    from lance_mlx.checkpoint.recipe import RECIPES, recipe_of
    from lance_mlx.errors import LanceError

    if not (what.isdecimal() or what in RECIPES or Path(what).exists()):
        raise LanceError(f"there is no recipe '{what}': give bits such as 4 or 8, {', '.join(RECIPES)}, or a JSON file")
    return recipe_of(bits=int(what)) if what.isdecimal() else recipe_of(predicate=what)
