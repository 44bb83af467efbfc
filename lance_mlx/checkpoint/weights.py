"""Loading a checkpoint strictly: every tensor is accounted for by name and shape before one is read."""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from lance_mlx.backend.numerics import Numerics
from lance_mlx.checkpoint.folding import fold
from lance_mlx.checkpoint.recipe import Plan, Recipe, plan
from lance_mlx.checkpoint.safetensors import INTEGERS, Tensors
from lance_mlx.checkpoint.streaming import Streamed, StreamedVAE, stream_layers
from lance_mlx.checkpoint.tensors import Checkpoint, Part, ViTSource
from lance_mlx.config import LATENT_CHANNELS, LanceConfig
from lance_mlx.errors import LanceError
from lance_mlx.model.lance import Lance
from lance_mlx.model.quantized import Scheme, make_quantized, quantizable
from lance_mlx.model.vae import VAE
from lance_mlx.model.vae_decoder import DecoderShape, UpBlockShape
from lance_mlx.model.vae_encoder import DownBlockShape, EncoderShape
from lance_mlx.model.vae_layers import PACKED_CHANNELS
from lance_mlx.model.vit import ViTConfig

Tracker = Callable[[list], Iterable]
_VAE_ENCODER = re.compile(r"encoder\.|conv1\.")
_HEAD = "language_model.lm_head."


class Architecture(NamedTuple):
    """A checkpoint's configurations and tensors, which fit each other; `vit_config` is None without a ViT.

    Attributes:
        packed: the modules whose weights are quantized in the files, by path.
    """

    config: LanceConfig
    vit_config: ViTConfig | None
    parts: tuple[Part, ...]
    packed: dict[str, Scheme]

    def build(self, numerics: Numerics) -> Lance:
        """The model without its weights; raises LanceError naming the first tensor that it has no place for."""
        model = Lance(self.config, numerics, self.vit_config)
        modules = quantizable(model)
        make_quantized(model, {path: self.packed[path] for path in self.packed if path in modules}, numerics.dtype)
        check_tensors(model, self.parts)
        return model


def inspect_lance(checkpoint: Checkpoint, with_vit: bool, vit_source: ViTSource) -> Architecture:
    """Everything but the VAE, unread; raises LanceError naming a wrong key, or a missing, extra or misshapen tensor."""
    parts = [checkpoint.lance()]
    config, vit_config = checkpoint.llm_config(LanceConfig.from_dict), None
    if with_vit:
        vit_config = checkpoint.vit_config(ViTConfig.from_dict)
        parts.append(checkpoint.vit(vit_source))
        if vit_config.out_hidden_size != config.hidden_size:
            sizes = f"{vit_config.out_hidden_size}, but the language model's is {config.hidden_size}"
            raise LanceError(f"{checkpoint.folder}: the ViT's out_hidden_size is {sizes}")
    packed = {}
    for part in parts:
        packed |= packed_modules(part, checkpoint.quantization)
    return Architecture(config, vit_config, tuple(parts), packed)


def packed_modules(part: Part, recipe: Recipe | None) -> dict[str, Scheme]:
    """How the modules that are quantized in a part of a checkpoint are; raises LanceError where it does not say."""
    packed = {}
    for name in part.tensors:
        path = name.removesuffix(".scales")
        if path == name:
            continue
        scheme = recipe.stored(path) if recipe else None
        if scheme is None:
            said = "says that it is not" if recipe else "has no 'quantization'"
            raise LanceError(f"{part.path}: tensor '{path}.weight' is quantized, but config.json {said}")
        packed[path] = scheme
    return packed


def load_lance(
    checkpoint: Checkpoint,
    numerics: Numerics,
    with_vit: bool = False,
    vit_source: ViTSource = ViTSource.LANCE,
    track: Tracker = iter,
    streams: bool = False,
    recipe: Recipe | None = None,
) -> Lance:
    """The model without its VAE, cast to the policy's dtype; raises LanceError naming a wrong tensor.

    The output head, which writes text only, is read when it is first used.

    Args:
        with_vit: load the ViT too, which only tasks that look at pictures need.
        vit_source: whose ViT wins where there are two.
        track: wraps the list of tensors while they are read, as tqdm does.
        streams: read the decoder layers and the ViT each time they run, and drop them after that.
        recipe: quantize each weight by this when it is read.
    """
    architecture = inspect_lance(checkpoint, with_vit, vit_source)
    model = architecture.build(numerics)
    tensors, to_pack = _joined(architecture.parts), Plan()
    if recipe is not None:
        check_unpacked(checkpoint, architecture.packed)
        to_pack = plan(recipe, model)
        make_quantized(model, to_pack, numerics.dtype)
        if recipe.scales:
            tensors = fold(tensors, recipe.scales)
    if streams:
        tensors = stream_layers(model, tensors)
    _fill(model, tensors, numerics, track, to_pack)
    return model


def check_unpacked(checkpoint: Checkpoint, packed: Mapping[str, Scheme]) -> None:
    """Raise LanceError for a checkpoint that shall be quantized and has modules that are."""
    for how in packed.values():
        raise LanceError(f"{checkpoint.folder} is quantized already ({how}): give the one it was made from")


def load_vae(part: Part, numerics: Numerics, with_encoders: bool = False) -> VAE:
    """The VAE, cast to the policy's dtype; its widths come from the tensors' shapes.

    Args:
        with_encoders: load the encoder too, which only tasks that look at pixels need.

    Raises:
        LanceError: a tensor is missing, extra, misshapen or not finite.
    """
    decoder, encoder = _halves(part)
    if not with_encoders:
        part = decoder
    model = VAE(decoder_shape(part), encoder_shape(part) if with_encoders else None, numerics)
    check_tensors(model, [part])
    _fill(model, part.tensors, numerics)
    return model


def stream_vae(part: Part, numerics: Numerics, with_encoders: bool = False) -> StreamedVAE:
    """As `load_vae`, but the decoder and the encoder are each read when they are used, and dropped after that."""
    decoder, encoder = _halves(part)
    decodes = VAE(decoder_shape(decoder), None, numerics)
    check_tensors(decodes, [decoder])
    if not with_encoders:
        return StreamedVAE(Streamed(decodes, decoder.tensors, numerics.dtype), None)
    encodes = VAE(None, encoder_shape(encoder), numerics)
    check_tensors(encodes, [encoder])
    both = ((decodes, decoder), (encodes, encoder))
    return StreamedVAE(*(Streamed(vae, half.tensors, numerics.dtype) for vae, half in both))


def _halves(part: Part) -> tuple[Part, Part]:
    """The decoder's tensors and the encoder's."""
    encoder = {name: tensor for name, tensor in part.tensors.items() if _VAE_ENCODER.match(name)}
    decoder = {name: tensor for name, tensor in part.tensors.items() if name not in encoder}
    return Part(part.path, decoder), Part(part.path, encoder)


def check_tensors(model: nn.Module, parts: Iterable[Part]) -> None:
    """Raise LanceError naming the first tensor that is missing, extra, misshapen or of another kind for a model."""
    expected = dict(tree_flatten(model.parameters()))
    found = {name: (part.path, tensor) for part in parts for name, tensor in part.tensors.items()}
    first = next(iter(parts)).path
    missing = sorted(set(expected) - set(found))
    if missing:
        raise LanceError(f"{first}: tensor '{missing[0]}' is missing ({len(missing)} in all): fetch the file again")
    extra = sorted(set(found) - set(expected))
    if extra:
        path = found[extra[0]][0]
        raise LanceError(f"{path}: unexpected tensor '{extra[0]}' ({len(extra)} in all): it is not a Lance checkpoint")
    for name, parameter in expected.items():
        path, tensor = found[name]
        if tensor.shape != parameter.shape:
            packed = f"{name.rpartition('.')[0]}.scales" in expected
            hint = ": config.json's quantization says otherwise than the file" if packed else ""
            shapes = f"{list(tensor.shape)}, expected {list(parameter.shape)}"
            raise LanceError(f"{path}: tensor '{name}' has shape {shapes}{hint}")
        integer = next((kind for kind in INTEGERS if parameter.dtype == getattr(mx, kind)), None)
        if (tensor.info.dtype if tensor.info.dtype in INTEGERS else None) != integer:
            wanted = integer or "float32, bfloat16 or float16"
            raise LanceError(f"{path}: tensor '{name}' is {tensor.info.dtype}; {wanted} is expected")


def _joined(parts: Iterable[Part]) -> Tensors:
    return dict(chain.from_iterable(part.tensors.items() for part in parts))


def _fill(
    model: nn.Module, tensors: Tensors, numerics: Numerics, track: Tracker = iter, to_pack: Mapping[str, Scheme] = {}
) -> None:
    """Set parameters, one tensor after the other, so that no more than one exists in two dtypes at a time."""
    for name in track([name for name in tensors if not name.startswith(_HEAD)]):
        arrays = _arrays(name, tensors[name].read(numerics.dtype), to_pack)
        mx.eval(arrays)
        model.load_weights(arrays, strict=False)
    for name in tensors:
        if name.startswith(_HEAD):
            model.load_weights(_arrays(name, tensors[name].lazy(numerics.dtype), to_pack), strict=False)


def _arrays(name: str, array: mx.array, to_pack: Mapping[str, Scheme]) -> list[tuple[str, mx.array]]:
    """A parameter, or those that its weight is packed in."""
    path, _, kind = name.rpartition(".")
    if kind != "weight" or path not in to_pack:
        return [(name, array)]
    return [(f"{path}.{kind}", packed) for kind, packed in to_pack[path].quantize(array).items()]


def decoder_shape(part: Part) -> DecoderShape:
    """Read the decoder's structure off its tensors; raises LanceError for those of another model."""
    stem = _stem(part, "decoder.conv1.weight", LATENT_CHANNELS)
    stages = [UpBlockShape(*stage) for stage in _stages(part, "decoder.upsamples", "upsamples")]
    return DecoderShape(stem, tuple(stages))


def encoder_shape(part: Part) -> EncoderShape:
    """Read the encoder's structure off its tensors; raises LanceError for those of another model."""
    stem = _stem(part, "encoder.conv1.weight", PACKED_CHANNELS)
    stages = [DownBlockShape(*stage) for stage in _stages(part, "encoder.downsamples", "downsamples")]
    return EncoderShape(stem, tuple(stages))


def _stem(part: Part, name: str, in_channels: int) -> int:
    shape = _shape_of(part, name)
    if len(shape) != 5 or shape[-1] != in_channels:
        raise LanceError(f"{part.path}: '{name}' has shape {list(shape)}, expected are {in_channels} input channels")
    return shape[0]


def _stages(part: Part, root: str, inner: str) -> list[tuple[int, int, int, bool, bool]]:
    """(in, out, residual blocks, resamples space, resamples time) of every stage below `root`."""
    path, tensors = part
    below = re.compile(rf"{re.escape(root)}\.(\d+)\.")
    numbers = {int(match[1]) for name in tensors if (match := below.match(name))}
    if not numbers:
        raise LanceError(f"{path}: there are no {root}: it is not Wan 2.2's VAE")
    stages = []
    for stage in range(max(numbers) + 1):
        prefix = f"{root}.{stage}.{inner}"
        blocks = 0
        while f"{prefix}.{blocks}.residual.2.weight" in tensors:
            blocks += 1
        kernel = _shape_of(part, f"{prefix}.0.residual.2.weight")
        space, time = (f"{prefix}.{blocks}.{name}" in tensors for name in ("resample.1.weight", "time_conv.weight"))
        stages.append((kernel[-1], kernel[0], blocks, space, time))
    return stages


def _shape_of(part: Part, name: str) -> tuple[int, ...]:
    if name not in part.tensors:
        raise LanceError(f"{part.path}: tensor '{name}' is missing: it is not Wan 2.2's VAE")
    return part.tensors[name].shape
