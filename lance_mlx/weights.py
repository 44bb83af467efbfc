"""Loading the official checkpoint layout, strictly: every tensor is accounted for by name and shape."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from lance_mlx.config import LATENT_CHANNELS, LanceConfig
from lance_mlx.convert import read_pth
from lance_mlx.errors import LanceError
from lance_mlx.model.lance import Lance
from lance_mlx.model.vae import VAE
from lance_mlx.model.vae_decoder import DecoderShape, UpBlockShape
from lance_mlx.model.vae_encoder import DownBlockShape, EncoderShape
from lance_mlx.model.vae_layers import PACKED_CHANNELS
from lance_mlx.model.vit import ViTConfig
from lance_mlx.numerics import Numerics
from lance_mlx.request import Variant

Tracker = Callable[[list], Iterable]
_VAE_FILES = ("Wan2.2_VAE.safetensors", "Wan2.2_VAE.pth")
_VIT_FOLDER = "Qwen2.5-VL-ViT"
_VIT = "vit_model."
_POSITION_TABLE = "latent_pos_embed.pos_embed"
"""Recomputed whatever its stored size."""
_VAE_ENCODER = re.compile(r"encoder\.|conv1\.")


class ViTSource(StrEnum):
    """Whose ViT weights win where both the Lance file and the ViT file hold them.

    Upstream reads the ViT file first and the Lance file over it; the video checkpoint holds a ViT, the image one does
    not.
    """

    LANCE = "lance"
    VIT_FILE = "vit_file"


@dataclass(frozen=True)
class Checkpoint:
    """Where the parts of an official checkpoint lie; `vit` is None where there is no folder of the ViT."""

    folder: Path
    weights: Path
    vae: Path
    vit: Path | None


def check_folder(path: Path) -> None:
    """Raise LanceError unless there is such a folder, which costs nothing before a model is read."""
    if not path.is_dir():
        raise LanceError(f"model folder {path} does not exist: give the folder of an official Lance checkpoint")


def find_checkpoint(path: Path, variant: Variant) -> Checkpoint:
    """Locate the files of a variant.

    Args:
        path: the folder that holds Lance_3B, Lance_3B_Video, the ViT and the VAE, or one of the first two.

    Raises:
        LanceError: a file is missing.
    """
    check_folder(path)
    folder = path if (path / "llm_config.json").exists() else path / variant
    if not (folder / "llm_config.json").is_file():
        raise LanceError(f"{path} holds neither llm_config.json nor {variant}/llm_config.json")
    weights = next((p for p in (folder / "model.safetensors", folder / "ema.safetensors") if p.is_file()), None)
    if weights is None:
        raise LanceError(f"{folder / 'model.safetensors'} is missing")
    candidates = [place / name for place in (folder, folder.parent) for name in _VAE_FILES]
    vae = next((p for p in candidates if p.is_file()), None)
    if vae is None:
        raise LanceError(f"no {' or '.join(_VAE_FILES)} in {folder} or {folder.parent}: the VAE belongs there")
    vit = next((p for p in (folder / _VIT_FOLDER, folder.parent / _VIT_FOLDER) if p.is_dir()), None)
    return Checkpoint(folder, weights, vae, vit)


def load_lance(
    checkpoint: Checkpoint,
    numerics: Numerics,
    with_vit: bool = False,
    vit_source: ViTSource = ViTSource.LANCE,
    track: Tracker = iter,
) -> Lance:
    """The model without its VAE, cast to the policy's dtype; raises LanceError naming a wrong tensor.

    Args:
        with_vit: load the ViT too, which only tasks that look at pictures need.
        vit_source: whose ViT wins where there are two.
        track: wraps the list of tensors while they are read, as tqdm does.
    """
    arrays = _read_safetensors(checkpoint.weights)
    arrays = {name: array for name, array in arrays.items() if name != _POSITION_TABLE}
    own_vit = {name: arrays.pop(name) for name in list(arrays) if name.startswith(_VIT)}
    vit_config = None
    if with_vit:
        vit_config = ViTConfig.from_file(_vit_file(checkpoint, "config.json"))
        arrays |= _vit_weights(checkpoint, own_vit, vit_source)
    config = LanceConfig.from_file(checkpoint.folder / "llm_config.json")
    if vit_config and vit_config.out_hidden_size != config.hidden_size:
        sizes = f"{vit_config.out_hidden_size}, but the language model's is {config.hidden_size}"
        raise LanceError(f"{checkpoint.vit / 'config.json'}: out_hidden_size is {sizes}")
    model = Lance(config, numerics, vit_config)
    _load(model, arrays, checkpoint.weights, numerics)
    # The output head writes text only; left unevaluated, it is never read from disk by a task that draws.
    used = [item for item in tree_flatten(model.parameters()) if not item[0].startswith("language_model.lm_head")]
    _evaluate(track(used), checkpoint.weights)
    return model


def _vit_weights(checkpoint: Checkpoint, own: dict[str, mx.array], source: ViTSource) -> dict[str, mx.array]:
    if own and source is ViTSource.LANCE:
        return own
    path = _vit_file(checkpoint, "vit.safetensors")
    return {f"{_VIT}{name}": array for name, array in _read_safetensors(path).items()}


def _vit_file(checkpoint: Checkpoint, name: str) -> Path:
    path = (checkpoint.vit or checkpoint.folder.parent / _VIT_FOLDER) / name
    if not path.is_file():
        raise LanceError(f"{path} is missing: tasks that look at pictures need the ViT")
    return path


def load_vae(checkpoint: Checkpoint, numerics: Numerics, with_encoder: bool = False) -> VAE:
    """The VAE, cast to the policy's dtype; its widths come from the tensors' shapes.

    Args:
        with_encoder: load the encoder too, which only tasks that look at pixels need.
    """
    path = checkpoint.vae
    arrays = read_pth(path) if path.suffix == ".pth" else _read_safetensors(path)
    if not with_encoder:
        arrays = {name: array for name, array in arrays.items() if not _VAE_ENCODER.match(name)}
    model = VAE(_decoder_shape(arrays, path), _encoder_shape(arrays, path) if with_encoder else None, numerics)
    _load(model, {name: _channels_last(name, array) for name, array in arrays.items()}, path, numerics)
    _evaluate(tree_flatten(model.parameters()), path)
    return model


def _read_safetensors(path: Path) -> dict[str, mx.array]:
    try:
        arrays = mx.load(str(path), format="safetensors")
    except (RuntimeError, ValueError, OSError) as error:
        raise LanceError(f"{path} is not a readable safetensors file ({str(error).strip()}): fetch it again") from None
    for name, array in arrays.items():
        if array.dtype not in (mx.float32, mx.bfloat16, mx.float16):
            raise LanceError(f"{path}: tensor '{name}' is {array.dtype}; float32, bfloat16 or float16 is expected")
    return arrays


def _load(model: nn.Module, arrays: dict[str, mx.array], path: Path, numerics: Numerics) -> None:
    """Fill every parameter of `model`, or raise naming the first missing, extra or misshapen tensor."""
    expected = {name: parameter.shape for name, parameter in tree_flatten(model.parameters())}
    missing = sorted(set(expected) - set(arrays))
    if missing:
        raise LanceError(f"{path}: tensor '{missing[0]}' is missing ({len(missing)} in all): fetch the file again")
    extra = sorted(set(arrays) - set(expected))
    if extra:
        raise LanceError(f"{path}: unexpected tensor '{extra[0]}' ({len(extra)} in all): it is not a Lance checkpoint")
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise LanceError(f"{path}: tensor '{name}' has shape {list(arrays[name].shape)}, expected {list(shape)}")
    model.load_weights([(name, array.astype(numerics.dtype)) for name, array in arrays.items()])


def _evaluate(named: Iterable[tuple[str, mx.array]], path: Path) -> None:
    """Read the tensors one by one, so that no more than one exists in two dtypes at a time."""
    for name, array in named:
        try:
            finite = mx.isfinite(array).all().item()
        except RuntimeError as error:
            raise LanceError(f"{path} cannot be read to its end ({error}): fetch it again") from None
        if not finite:
            raise LanceError(f"{path}: tensor '{name}' holds NaN or infinite values: fetch the file again")


def _channels_last(name: str, array: mx.array) -> mx.array:
    """PyTorch's (o, i, t, h, w) and (o, i, h, w) kernels as (o, ..., i); a norm's gamma as a vector."""
    if name.endswith(".gamma"):
        return array.reshape(-1)
    return mx.moveaxis(array, 1, -1) if array.ndim > 1 else array


def _decoder_shape(arrays: dict[str, mx.array], path: Path) -> DecoderShape:
    """Read the decoder's structure off its tensors."""
    stem = _stem(arrays, "decoder.conv1.weight", LATENT_CHANNELS, path)
    stages = [UpBlockShape(*stage) for stage in _stages(arrays, "decoder.upsamples", "upsamples", path)]
    return DecoderShape(stem, tuple(stages))


def _encoder_shape(arrays: dict[str, mx.array], path: Path) -> EncoderShape:
    """Read the encoder's structure off its tensors."""
    stem = _stem(arrays, "encoder.conv1.weight", PACKED_CHANNELS, path)
    stages = [DownBlockShape(*stage) for stage in _stages(arrays, "encoder.downsamples", "downsamples", path)]
    return EncoderShape(stem, tuple(stages))


def _stem(arrays: dict[str, mx.array], name: str, in_channels: int, path: Path) -> int:
    shape = _shape_of(arrays, name, path)
    if len(shape) != 5 or shape[1] != in_channels:
        raise LanceError(f"{path}: '{name}' has shape {list(shape)}, but {in_channels} input channels are expected")
    return shape[0]


def _stages(arrays: dict[str, mx.array], root: str, inner: str, path: Path) -> list[tuple[int, int, int, bool, bool]]:
    """(in, out, residual blocks, resamples space, resamples time) of every stage below `root`."""
    numbers = {int(match[1]) for name in arrays if (match := re.match(rf"{re.escape(root)}\.(\d+)\.", name))}
    if not numbers:
        raise LanceError(f"{path}: there are no {root}: it is not Wan 2.2's VAE")
    stages = []
    for stage in range(max(numbers) + 1):
        prefix = f"{root}.{stage}.{inner}"
        blocks = 0
        while f"{prefix}.{blocks}.residual.2.weight" in arrays:
            blocks += 1
        kernel = _shape_of(arrays, f"{prefix}.0.residual.2.weight", path)
        space, time = (f"{prefix}.{blocks}.{name}" in arrays for name in ("resample.1.weight", "time_conv.weight"))
        stages.append((kernel[1], kernel[0], blocks, space, time))
    return stages


def _shape_of(arrays: dict[str, mx.array], name: str, path: Path) -> tuple[int, ...]:
    if name not in arrays:
        raise LanceError(f"{path}: tensor '{name}' is missing: it is not Wan 2.2's VAE")
    return arrays[name].shape
