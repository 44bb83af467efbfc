"""The parameters of lance_mlx in the checkpoint's names and PyTorch's layout."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from lance_mlx.pipeline import Pipeline

_HEAD = "language_model.lm_head."


def named_weights(pipeline: Pipeline, with_head: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter, float32, under the checkpoint's name; the VAE's behind "vae."."""
    for name, array in tree_flatten(pipeline.model.parameters()):
        if with_head or not name.startswith(_HEAD):
            yield name, np.array(array.astype(mx.float32))
    for name, array in tree_flatten(pipeline.vae.parameters()):
        yield f"vae.{name}", _channels_first(np.array(array.astype(mx.float32)))


@contextmanager
def replaced_weights(pipeline: Pipeline, given: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Let parameters hold other values for a while; arrays are in PyTorch's layout."""
    model, vae = pipeline.model, pipeline.vae
    before = {name: array for name, array in tree_flatten(model.parameters()) if name in given}
    coded = {name: array for name, array in tree_flatten(vae.parameters()) if f"vae.{name}" in given}
    dtype = model.numerics.dtype
    try:
        model.load_weights([(name, mx.array(given[name]).astype(dtype)) for name in before], strict=False)
        vae.load_weights(
            [(name, mx.array(_channels_last(given[f"vae.{name}"])).astype(dtype)) for name in coded], strict=False
        )
        yield
    finally:
        model.load_weights(list(before.items()), strict=False)
        vae.load_weights(list(coded.items()), strict=False)


def _channels_first(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, -1, 1) if array.ndim > 1 else array


def _channels_last(array: np.ndarray) -> np.ndarray:
    if array.ndim > 1 and array.size == array.shape[0]:
        return array.reshape(-1)  # a norm's gamma
    return np.moveaxis(array, 1, -1) if array.ndim > 1 else array
