"""What a request will need: peak memory and time, estimated from the model's sizes before anything is read.

Compared with what was measured (`mx.get_peak_memory`, MLX 0.32.4, its CPU backend on Linux, OpenBLAS) on random
checkpoints of hidden size 64 and 512: see `peak_memory` and `machine.measure`. On a GPU, where convolutions and
bfloat16's attention materialise nothing, only the passes of a step have been compared: on an H200, at the official
width and depth, from 1,024 to 4,096 latents in bfloat16, within 25 %.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from lance_mlx.backend.numerics import BFLOAT16, Numerics
from lance_mlx.backend.pieces import PIECE_VALUES
from lance_mlx.checkpoint.recipe import Recipe, plan
from lance_mlx.checkpoint.tensors import Checkpoint, ViTSource
from lance_mlx.checkpoint.weights import check_unpacked, decoder_shape, encoder_shape, packed_modules
from lance_mlx.config import SPATIAL_STRIDE, TEMPORAL_STRIDE, LanceConfig
from lance_mlx.estimate.cost import Convolution, decoder_convolutions, encoder_convolutions
from lance_mlx.estimate.tiling import Coder
from lance_mlx.media.preprocess import TEMPORAL_PATCH_SIZE, VIT_DIVISOR
from lance_mlx.model.attention import GPU_SCORE_BUDGET
from lance_mlx.model.lance import Lance
from lance_mlx.model.quantized import Scheme, make_quantized
from lance_mlx.model.vae import VAE, TileChooser
from lance_mlx.model.vae_decoder import DecoderShape, UpBlockShape
from lance_mlx.model.vae_encoder import DownBlockShape, EncoderShape
from lance_mlx.model.vit import ViTConfig
from lance_mlx.requests.request import Question, Request, Task
from lance_mlx.sampling.flow import goes_in_one_pass
from lance_mlx.sampling.guidance import is_guided
from lance_mlx.sampling.schedule import timesteps

TEXT_TOKENS = 64
"""Of template and prompt: a few tens, which weigh little beside the latents."""
_MLP_VALUES_ON_GPU = 12
"""How many such things exist at once, fitted to what was measured on an H200."""


class _Layer(NamedTuple):
    """Of a layer on the CPU: matrices of its MLP that are cast, bytes a value inside its MLP, and bytes a value of the
    hidden states around it."""

    casts: int
    value: float
    around: float


_LAYERS = {"float32": _Layer(0, 20.0, 70.0), "bfloat16": _Layer(2, 30.0, 60.0)}
_IN_PIECES = {"float32": _Layer(0, 34.5, 6.0), "bfloat16": _Layer(3, 14.0, 8.3)}
"""The same where rows go in pieces, between which MLX does not run ahead."""


@dataclass(frozen=True)
class Sizes:
    """Everything about a model that its memory and time follow from.

    Attributes:
        quantized: the modules whose weights are packed, by path.
    """

    config: LanceConfig
    vit: ViTConfig
    decoder: DecoderShape
    encoder: EncoderShape
    quantized: Mapping[str, Scheme] = field(default_factory=dict)


OFFICIAL = Sizes(
    LanceConfig(151936, 2048, 11008, 36, 16, 2, 128, 1e-6, 1e6, (16, 24, 24), 2, {}),
    ViTConfig(32, 1280, 3420, 16, 2048, 14, 2, 2, 112, (7, 15, 23, 31)),
    DecoderShape(
        1024,
        (
            UpBlockShape(1024, 1024, 3, True, True),
            UpBlockShape(1024, 1024, 3, True, True),
            UpBlockShape(1024, 512, 3, True, False),
            UpBlockShape(512, 256, 3, False, False),
        ),
    ),
    EncoderShape(
        160,
        (
            DownBlockShape(160, 160, 2, True, False),
            DownBlockShape(160, 320, 2, True, True),
            DownBlockShape(320, 640, 2, True, True),
            DownBlockShape(640, 640, 2, False, False),
        ),
    ),
)


def sizes_of(
    checkpoint: Checkpoint, looks: bool, vit_source: ViTSource = ViTSource.LANCE, recipe: Recipe | None = None
) -> Sizes:
    """Those of a checkpoint; raises LanceError where a file is missing or wrong.

    Args:
        looks: whether the ViT is needed: without, the official one stands in, and counts nothing.
        recipe: what the weights are quantized by when they are read.
    """
    vit, quantized = OFFICIAL.vit, packed_modules(checkpoint.lance(), checkpoint.quantization)
    if looks:
        vit = checkpoint.vit_config(ViTConfig.from_dict)
        quantized |= packed_modules(checkpoint.vit(vit_source), checkpoint.quantization)
    vae = checkpoint.vae()
    config = checkpoint.llm_config(LanceConfig.from_dict)
    sizes = Sizes(config, vit, decoder_shape(vae), encoder_shape(vae), quantized)
    if recipe is None:
        return sizes
    check_unpacked(checkpoint, quantized)
    return quantized_by(recipe, sizes, looks)


def quantized_by(recipe: Recipe, sizes: Sizes, looks: bool = True) -> Sizes:
    """The sizes of a model once a recipe has quantized it; raises LanceError where they do not go together."""
    return replace(sizes, quantized=plan(recipe, Lance(sizes.config, BFLOAT16, sizes.vit if looks else None)))


class Weights(NamedTuple):
    """Bytes of the parameters in memory; `layer` is one of the decoder layers, `others` what belongs to no layer."""

    layer: int
    layers: int
    others: int
    head: int
    vit: int
    decoder: int
    encoder: int


def weights_of(sizes: Sizes, numerics: Numerics) -> Weights:
    """Bytes of the parameters under a policy."""
    lance = Lance(sizes.config, numerics, sizes.vit)
    make_quantized(lance, sizes.quantized, numerics.dtype)
    decoder, encoder = VAE(sizes.decoder, None, numerics), VAE(None, sizes.encoder, numerics)

    def held(module: nn.Module) -> int:
        parameters = (parameter for _, parameter in tree_flatten(module.parameters()))
        return sum(
            each.nbytes if each.dtype in (mx.uint32, mx.uint8) else each.size * numerics.dtype.size
            for each in parameters
        )

    layers = [held(layer) for layer in lance.language_model.model.layers]
    total, head, vit = map(held, (lance, lance.language_model.lm_head, lance.vit_model))
    return Weights(max(layers), sum(layers), total - head - vit - sum(layers), head, vit, held(decoder), held(encoder))


class Pass(NamedTuple):
    """Passes through the layers, each with so many readings of a segment, and how many such passes.

    Attributes:
        und, gen: rows of each expert in a reading.
        keys: what those see.
    """

    und: int
    gen: int
    keys: int
    times: int = 1
    readings: int = 1

    @property
    def rows(self) -> int:
        """Rows of a reading."""
        return self.und + self.gen


class Work(NamedTuple):
    """What a request computes.

    Attributes:
        reading: the passes over what comes before the latents or the answer.
        steps: those of the denoising steps, or of the tokens of an answer.
        cached: tokens in the caches of all arms.
        patches: that the ViT looks at.
        encoded, decoded: latent frames, of `rows` and `columns` each.
        num_guided: steps that have two arms.
    """

    reading: tuple[Pass, ...]
    steps: tuple[Pass, ...]
    cached: int
    patches: int
    encoded: int
    decoded: int
    rows: int
    columns: int
    num_guided: int

    @property
    def cells(self) -> int:
        """Of a latent frame."""
        return self.rows * self.columns


def work_of(request: Request | Question, num_frames: int, on_cpu: bool) -> Work:
    """What a request computes; one picture or video of `num_frames` is looked at where its task takes some."""
    tokens = 0
    if request.task.takes and request.task is not Task.I2V:
        slices = -(-num_frames // TEMPORAL_PATCH_SIZE) if request.task.is_for_video else 1
        tokens = slices * (request.vit_resolution // VIT_DIVISOR) ** 2 + 2
    read = TEXT_TOKENS + tokens
    patches = 4 * max(tokens - 2, 0)
    if isinstance(request, Question):
        answers = Pass(1, 0, read + request.max_new_tokens, request.max_new_tokens)
        return Work((Pass(read, 0, read),), (answers,), read + request.max_new_tokens, patches, 0, 0, 0, 0, 0)
    frames, rows, columns = request.latent_grid
    latents, clean, encoded = frames * rows * columns, 0, 0
    if request.task is Task.I2V:
        encoded = 1
    elif request.task.size_from_source:
        clean, encoded = latents, frames
    elif request.task is Task.SUBJECT:
        clean, encoded = (request.vae_resolution // SPATIAL_STRIDE) ** 2, 1
    num_guided = sum(is_guided(t, request) for t in timesteps(request.num_steps, request.timestep_shift)[:-1])
    arms = 2 if request.guidance_scale > 1 else 1
    reading = [Pass(read, 0, read, arms)] + ([Pass(2, clean, read + clean + 2, arms)] if clean else [])
    prefix = read + (clean + 2 if clean else 0)
    block = 2, latents, prefix + latents + 2
    if goes_in_one_pass(latents, on_cpu):
        steps = Pass(*block, request.num_steps - num_guided), Pass(*block, num_guided, readings=2)
    else:
        steps = (Pass(*block, request.num_steps + num_guided),)
    steps = tuple(each for each in steps if each.times)
    return Work(tuple(reading), steps, arms * prefix, patches, encoded, frames, rows, columns, num_guided)


def coders_of(sizes: Sizes, numerics: Numerics, low_ram: bool, on_cpu: bool) -> tuple[Coder, Coder]:
    """The VAE's decoder and encoder, with what is in memory while each runs."""
    weights = weights_of(sizes, numerics)
    held = weights.others if low_ram else weights.others + weights.layers + weights.decoder
    decoding, encoding = (weights.decoder, weights.encoder) if low_ram else (0, weights.vit + weights.encoder)
    pixels = TEMPORAL_STRIDE * SPATIAL_STRIDE**2 * 3
    return (
        Coder(decoder_convolutions, sizes.decoder, on_cpu, pixels + sizes.decoder.channels, held + decoding),
        Coder(encoder_convolutions, sizes.encoder, on_cpu, sizes.encoder.down_blocks[-1].out_channels, held + encoding),
    )


def peak_memory(
    sizes: Sizes,
    numerics: Numerics,
    work: Work,
    low_ram: bool,
    on_cpu: bool,
    tile_for: TileChooser = lambda grid, encodes: None,
) -> dict[str, int]:
    """Bytes of MLX's arrays at the peak of every stage of one request from the command line; the VAE may be in tiles.

    Within 25 % of `mx.get_peak_memory` where it was compared on the CPU: hidden size 64 at 256x256 and 512x512, float32
    and bfloat16, with and without `low_ram`. What a layer makes at the official width and 1,024 latents is taken for
    twice (float32) and 1.5 times (bfloat16) of what one layer by itself was seen to make.
    """
    config, weights = sizes.config, weights_of(sizes, numerics)
    looks, answers = work.patches + work.encoded > 0, work.decoded == 0
    held = weights.others + (weights.head if answers else 0)
    caches = _cache(config, work.cached, numerics)
    heads, width = config.num_attention_heads, config.intermediate_size

    def activations(item: Pass) -> int:
        return _activations(item, heads, width, config.hidden_size, numerics, on_cpu)

    largest = max(activations(item) for item in (*work.reading, *work.steps))
    if answers and on_cpu and numerics.name == "bfloat16":
        largest = max(largest, 2 * weights.head)
    vit = sizes.vit
    seeing = (Pass(work.patches, 0, work.patches), vit.num_heads, vit.intermediate_size, vit.hidden_size)
    seeing = _activations(*seeing, numerics, on_cpu) if work.patches else 0
    decoder, encoder = coders_of(sizes, numerics, low_ram, on_cpu)
    size = work.rows, work.columns
    encoding, decoding = (
        coder.memory((frames, *size), tile_for((frames, *size), encodes) if frames else None)
        for coder, frames, encodes in ((encoder, work.encoded, True), (decoder, work.decoded, False))
    )
    if low_ram:
        looking = max(weights.vit + seeing if work.patches else 0, weights.encoder + encoding if work.encoded else 0)
        stages = {"looking": held + looking, "passes": held + caches + weights.layer + largest}
        return stages | ({} if answers else {"decoding": held + weights.decoder + decoding})
    held += weights.layers + weights.decoder
    looking = (weights.vit + weights.encoder + max(seeing, encoding)) if looks else 0
    stages = {"looking": held + looking, "passes": held + caches + largest}
    return stages | ({} if answers else {"decoding": held + decoding})


def _cache(config: LanceConfig, tokens: int, numerics: Numerics) -> int:
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim + config.hidden_size
    return tokens * values * numerics.dtype.size


def _activations(item: Pass, heads: int, width: int, hidden: int, numerics: Numerics, on_cpu: bool) -> int:
    """Bytes that exist at once in a layer: what its MLP makes, and what is around it, or its attention."""
    if not on_cpu:
        mlp = _MLP_VALUES_ON_GPU * item.readings * item.rows * width * numerics.dtype.size
        # In float32 scores and weights may exist, as in CUDA.
        scores = heads * item.rows * item.keys
        return mlp if numerics.name == "bfloat16" else max(mlp, 8 * min(scores, GPU_SCORE_BUDGET))
    # Half precision is multiplied in float32 there, and weights are cast as they are used.
    layer = (_IN_PIECES if item.rows * width > PIECE_VALUES else _LAYERS)[numerics.name]
    inside, around = min(item.rows * width, PIECE_VALUES), item.readings * item.rows * hidden
    return round(layer.casts * 4 * width * hidden + layer.value * inside + layer.around * around)


def coded(sizes: Sizes, work: Work) -> Iterator[tuple[int, Convolution]]:
    """The convolutions of a request, and how often each is computed."""
    for build, shape, frames in (
        (encoder_convolutions, sizes.encoder, work.encoded),
        (decoder_convolutions, sizes.decoder, work.decoded),
    ):
        if frames:
            yield from ((1, conv) for conv in build(shape, work.cells, first=True))
            yield from ((frames - 1, conv) for conv in build(shape, work.cells, first=False))
