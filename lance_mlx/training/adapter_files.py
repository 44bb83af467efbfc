"""Folders of adapters: mlx-lm's form (adapters.safetensors with adapter_config.json), whose names are those of the
checkpoint's modules, or peft's (adapter_model.safetensors)."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from lance_mlx.checkpoint.safetensors import TensorInfo, read_header, write_safetensors
from lance_mlx.config import read_config
from lance_mlx.errors import LanceError
from lance_mlx.files import whole, write_text
from lance_mlx.training.lora import Adapter, Pair

CONFIG = "adapter_config.json"
MLX, PEFT = "adapters.safetensors", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_PEFT_KINDS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}


def read_adapter(folder: Path) -> Adapter:
    """Read a folder in mlx-lm's form or peft's.

    Raises:
        LanceError: a file is missing or cannot be read, says what is not supported, or its tensors are no pairs.
    """
    folder = Path(folder)
    file = next((folder / name for name in (MLX, PEFT) if (folder / name).is_file()), None)
    if file is None:
        raise LanceError(f"{folder}: there is no {MLX} or {PEFT}: give the folder of an adapter")
    build = _scales_of_mlx if file.name == MLX else _scales_of_peft
    scale_of = read_config(folder / CONFIG, build, f"it belongs beside {file.name}")
    tensors = read_header(file)
    halves: dict[str, dict[str, mx.array]] = {}
    for name, tensor in tensors.items():
        path, kind = _parted(name, file)
        array = tensor.read(mx.float32)
        if array.ndim != 2:
            raise LanceError(f"{file}: tensor '{name}' has shape {list(array.shape)}: adapters have two axes")
        halves.setdefault(path, {})[kind] = array.T if file.name == PEFT else array
    pairs = {}
    for path, own in sorted(halves.items()):
        if len(own) < 2 or own["lora_a"].shape[1] != own["lora_b"].shape[0]:
            raise LanceError(f"{file}: the adapter of '{path}' lacks a half, or its halves do not fit each other")
        pairs[path] = Pair(own["lora_a"], own["lora_b"], scale_of(path, own["lora_a"].shape[1]))
    if not pairs:
        raise LanceError(f"{file} holds no adapter")
    mx.eval(pairs)
    return Adapter(str(folder), pairs)


def write_adapter(folder: Path, pairs: Mapping[str, Pair], peft: bool = False, notes: Mapping[str, Any] = {}) -> None:
    """Write adapters that all have one scale; each file appears when it is whole, the tensors before the config.

    Args:
        peft: in peft's form instead of mlx-lm's.
        notes: further entries of the config.

    Raises:
        LanceError: layers differ in their scale or rank, or a file cannot be written.
    """
    kinds = {(pair.a.shape[1], pair.scale) for pair in pairs.values()}
    if len(kinds) != 1:
        raise LanceError("adapters of several ranks or scales fit no config: fuse them instead")
    ((rank, scale),) = kinds
    arrays = {}
    for path, pair in pairs.items():
        for kind, array in (("lora_a", pair.a), ("lora_b", pair.b)):
            name = f"{_PEFT_PREFIX}{path}.{_PEFT_KINDS[kind]}" if peft else f"{path}.{kind}"
            values = np.array(array.astype(mx.float32))
            arrays[name] = np.ascontiguousarray(values.T if peft else values)
    config: dict[str, Any] = {"fine_tune_type": "lora"}
    if peft:
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "lora_dropout": 0.0, "bias": "none"}
        config["target_modules"] = sorted(pairs)
    else:
        config["lora_parameters"] = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted(pairs)}
    try:
        with whole(folder / (PEFT if peft else MLX)) as part, part.open("wb") as file:
            infos = {name: TensorInfo("float32", array.shape) for name, array in arrays.items()}
            write_safetensors(file, infos, lambda name: [arrays[name]], {"format": "pt" if peft else "mlx"})
        write_text(folder / CONFIG, json.dumps(config | dict(notes), indent=1))
    except OSError as error:
        raise LanceError(f"{folder} cannot be written ({error.strerror})") from None


def _parted(name: str, file: Path) -> tuple[str, str]:
    """Path of a layer, and which half of its adapter a tensor is."""
    if file.name == MLX:
        path, _, kind = name.rpartition(".")
        if kind in _PEFT_KINDS and path:
            return path, kind
    else:
        for kind, ending in _PEFT_KINDS.items():
            path = name.removesuffix(f".{ending}").removeprefix(_PEFT_PREFIX)
            if name.startswith(_PEFT_PREFIX) and name.endswith(f".{ending}"):
                return path, kind
    raise LanceError(f"{file}: tensor '{name}' is no part of a LoRA adapter, and nothing else is read")


def _scales_of_mlx(values: Mapping[str, Any]) -> Callable[[str, int], float]:
    """What the product of each layer's adapter is scaled by, as mlx-lm's config says."""
    kind, parameters = values.get("fine_tune_type", "lora"), values.get("lora_parameters")
    if kind != "lora" or not isinstance(parameters, dict):
        raise LanceError(f"'fine_tune_type' is {kind!r} and 'lora_parameters' {parameters!r}: only LoRA is read")
    scale = _number(parameters, "scale")
    return lambda path, rank: scale


def _scales_of_peft(values: Mapping[str, Any]) -> Callable[[str, int], float]:
    """The same as peft's config says: alpha over the rank, or over its root; a pattern matches the end of a path."""
    if values.get("peft_type") != "LORA" or values.get("use_dora") or values.get("fan_in_fan_out"):
        raise LanceError("only plain LoRA is read: 'peft_type' must be LORA, without use_dora and fan_in_fan_out")
    alpha, root = _number(values, "lora_alpha"), bool(values.get("use_rslora"))
    patterns = values.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise LanceError("'alpha_pattern' must be an object")
    own = {pattern: _number(patterns, pattern) for pattern in patterns}

    def scale_of(path: str, rank: int) -> float:
        found = next((own[key] for key in own if re.match(rf"(.*\.)?({key})$", path)), alpha)
        return found / (rank**0.5 if root else rank)

    return scale_of


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise LanceError(f"'{key}' must be a number, not {value!r}")
    return float(value)
