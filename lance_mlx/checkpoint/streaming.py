"""Parts of the model that are read from the checkpoint's files while they run and are in memory at no other time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from lance_mlx.backend.allocator import release
from lance_mlx.checkpoint.safetensors import StoredTensor, Tensors
from lance_mlx.checkpoint.tensors import VIT
from lance_mlx.model.lance import Lance
from lance_mlx.model.mot import ExpertRows, KeyValues, LayerInput, MoTDecoderLayer
from lance_mlx.model.vae import VAE, LatentStatistics, TileChooser
from lance_mlx.model.windows import Grid

_LAYERS = "language_model.model.layers."
_GENERATION = "_moe_gen."
"""In the names of what only the rows of latents pass."""

Values = deque[tuple[str, StoredTensor, np.ndarray]]


@dataclass(frozen=True)
class Streamed:
    """A module without weights, and where they lie; it has been checked that they fit.

    Attributes:
        dtype: of the parameters in memory.
    """

    module: nn.Module
    tensors: Tensors
    dtype: mx.Dtype

    @contextmanager
    def loaded(self) -> Iterator[nn.Module]:
        """The module with its weights, for the duration; what it made must be evaluated before the end.

        Raises:
            LanceError: a file ends too soon or holds a value that is not finite.
        """
        with _emptied_after(self.module, self.tensors):
            for name, tensor in self.tensors.items():
                self.module.load_weights([(name, tensor.read(self.dtype))], strict=False)
            yield self.module


class StreamedLayers(Sequence[Callable]):
    """The decoder layers: the weights of one are in memory while it runs, and beside it the bytes of the next.

    Those are read ahead in a thread, which sees files and NumPy only: MLX's arrays stay in the thread that runs them.
    """

    def __init__(self, layers: Sequence[MoTDecoderLayer], tensors: Sequence[Tensors], dtype: mx.Dtype) -> None:
        """
        Args:
            layers: without weights; quantized ones may differ.
            tensors: those of every layer, by their names in a layer.
            dtype: of the parameters in memory.
        """
        self._layers = layers
        self._tensors = tensors
        self._dtype = "float32" if dtype == mx.float32 else "bfloat16"
        self._thread = ThreadPoolExecutor(1)
        self._ahead: dict[tuple[int, bool], Future[Values]] = {}

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def modules(self) -> Sequence[MoTDecoderLayer]:
        """The layers themselves, without weights."""
        return self._layers

    def __getitem__(self, index: int) -> Callable[..., tuple[ExpertRows, list[KeyValues]]]:
        """A layer, to be called as a MoTDecoderLayer is; its output is evaluated."""
        return partial(self._run, range(len(self))[index])

    def _run(
        self, index: int, x: ExpertRows, contexts: Sequence[LayerInput], causal: bool, qk_float32: bool
    ) -> tuple[ExpertRows, list[KeyValues]]:
        both = x.gen is not None
        layer, values = self._layers[index], self._take(index, both)
        with _emptied_after(layer, self._tensors[index]):
            while values:
                name, tensor, read = values.popleft()
                layer.load_weights([(name, tensor.array(read))], strict=False)
                del read
            if index + 1 < len(self):
                self._ahead[index + 1, both] = self._thread.submit(self._read, index + 1, both)
            hidden, seen = layer(x, contexts, causal, qk_float32)
            mx.eval(*(rows for rows in hidden if rows is not None), seen)
        return hidden, seen

    def _take(self, index: int, both: bool) -> Values:
        ahead = self._ahead.pop((index, both), None)
        # A pass that was broken off has left what nobody takes.
        self._ahead.clear()
        return self._read(index, both) if ahead is None else ahead.result()

    def _read(self, index: int, both: bool) -> Values:
        """The values of a layer, of the generation expert's only where they are needed."""
        tensors = self._tensors[index].items()
        return deque((name, t, t.values(self._dtype)) for name, t in tensors if both or _GENERATION not in name)


class StreamedViT:
    """The vision tower, in memory only while it looks."""

    def __init__(self, vit: Streamed) -> None:
        self._vit = vit

    def __call__(self, patches: mx.array, grids: Sequence[Grid]) -> mx.array:
        """As VisionTransformer's, evaluated."""
        with self._vit.loaded() as vit:
            tokens = vit(patches, grids)
            mx.eval(tokens)
        return tokens


class StreamedVAE:
    """The VAE, whose decoder and encoder are each in memory only while they are used; it has VAE's methods.

    Args:
        decoder, encoder: VAEs of one half; None for an encoder that is not needed.

    Attributes:
        tile_for: as VAE's.
    """

    tile_for: TileChooser = staticmethod(lambda grid, encodes: None)

    def __init__(self, decoder: Streamed, encoder: Streamed | None) -> None:
        self._decoder = decoder
        self._encoder = encoder

    def decode(self, latents: mx.array) -> Iterator[mx.array]:
        """As `VAE.decode`."""
        with self._decoder.loaded() as vae:
            vae.tile_for = self.tile_for
            yield from vae.decode(latents)

    def encode(self, pixels: np.ndarray) -> LatentStatistics:
        """As `VAE.encode`."""
        with self._encoder.loaded() as vae:
            vae.tile_for = self.tile_for
            return vae.encode(pixels)


AnyVAE = VAE | StreamedVAE


def stream_layers(model: Lance, tensors: Tensors) -> Tensors:
    """Have the decoder layers and the ViT of a model without weights read them when they run.

    Args:
        tensors: all of the model's, which must fit it.

    Returns:
        Those that remain to be loaded.
    """
    dtype, transformer = model.numerics.dtype, model.language_model.model
    layers = transformer.layers
    own = [below(tensors, f"{_LAYERS}{index}.") for index in range(len(layers))]
    transformer.layers = StreamedLayers(layers, own, dtype)
    if "vit_model" in model:
        model.vit_model = StreamedViT(Streamed(model.vit_model, below(tensors, VIT), dtype))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith((_LAYERS, VIT))}


def below(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with a prefix, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@contextmanager
def _emptied_after(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Leave a module without the parameters of these names, which the block gives it."""
    try:
        yield
    finally:
        parameters = dict(tree_flatten(module.parameters()))
        module.load_weights([(name, mx.zeros((0,), parameters[name].dtype)) for name in names], strict=False)
        release()
