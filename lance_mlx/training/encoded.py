"""What the VAE and the ViT make of images and videos, computed once and kept, and the samples that it fills."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from lance_mlx.backend.numerics import Numerics
from lance_mlx.checkpoint.safetensors import TensorInfo, Tensors, read_header, write_safetensors
from lance_mlx.checkpoint.tensors import Part
from lance_mlx.checkpoint.weights import load_vae
from lance_mlx.config import SPATIAL_STRIDE
from lance_mlx.errors import LanceError
from lance_mlx.files import opened, whole
from lance_mlx.media.preprocess import MERGE_SIZE, vae_pixels, vit_patches
from lance_mlx.media.read import read_visual
from lance_mlx.model.lance import Lance
from lance_mlx.model.vae import LatentStatistics, num_decoded_frames
from lance_mlx.requests.request import Question, Request, Visual
from lance_mlx.requests.visuals import PreparedVisual
from lance_mlx.sequence.segments import Role
from lance_mlx.sequence.tokenizer import LanceTokenizer
from lance_mlx.training.data import Example, naming
from lance_mlx.training.pack import Sample, answering_sample, drawing_sample

_FEATURES = "features"
_NAMES = (set(LatentStatistics._fields), {_FEATURES})
_TEXTS = ("prompt", "instruction", "question", "answer")
Tracker = Callable[[list], Iterable]


class Cache:
    """Tensors by image or video, each in a file that is named by a checksum of all that they depend on.

    Args:
        folder: where they lie; what is there and is not asked for stays.
        key: what they depend on beside the image or video, as plain JSON values.
        digests: checksums of the files of images and videos, by path.
    """

    def __init__(self, folder: Path, key: list, digests: Mapping[str, str]) -> None:
        self._folder, self._key, self._digests = folder, key, digests
        self._found: dict[Visual, Tensors] = {}

    def missing(self, visuals: Iterable[Visual]) -> list[Visual]:
        """Those of which nothing is kept that can be read, each once."""
        return [visual for visual in dict.fromkeys(visuals) if not self._holds(visual)]

    def add(self, visual: Visual, arrays: Mapping[str, mx.array]) -> None:
        """Keep something; raises LanceError where it cannot be written."""
        bits = {n: np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a) for n, a in arrays.items()}
        kinds = {name: "bfloat16" if values.dtype == np.uint16 else "float32" for name, values in bits.items()}
        infos = {name: TensorInfo(kinds[name], values.shape) for name, values in bits.items()}
        path = self._path(visual)
        try:
            with whole(path) as beside, beside.open("wb") as file:
                write_safetensors(file, infos, lambda name: [bits[name]], {})
        except OSError as error:
            raise LanceError(f"{path} cannot be written ({error.strerror})") from None
        self._found[visual] = read_header(path)

    def __getitem__(self, visual: Visual) -> Tensors:
        return self._found[visual]

    def _holds(self, visual: Visual) -> bool:
        try:
            tensors = read_header(self._path(visual))
        except LanceError:
            return False
        self._found[visual] = tensors
        return set(tensors) in _NAMES

    def _path(self, visual: Visual) -> Path:
        key = json.dumps([self._key, visual.kind, self._digests[visual.path]])
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def digests_of(examples: Iterable[Example]) -> dict[str, str]:
    """Checksums of all files of examples by path; raises LanceError for one that cannot be read."""
    found: dict[str, str] = {}
    for example in examples:
        for visual in (*example.looked_at, *example.encoded):
            if visual.path not in found:
                try:
                    with opened(Path(visual.path)) as file:
                        found[visual.path] = hashlib.file_digest(file, "sha256").hexdigest()
                except OSError as error:
                    why = f"{visual.kind} {visual.path} cannot be read ({error.strerror})"
                    raise LanceError(f"{example.where}: {why}" if example.where else why) from None
    return found


def files_of(part: Part) -> list:
    """What tells the files of a part of a checkpoint from others, as plain JSON values."""
    files = sorted({tensor.path for tensor in part.tensors.values()})
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def encode(
    examples: Iterable[Example], cache: Cache, part: Part, numerics: Numerics, resolution: int, track: Tracker = iter
) -> None:
    """Fill a cache with the distributions of all latents; the VAE is read where one is missing.

    Raises:
        LanceError: an image or a video cannot be used, naming the example, or the cache cannot be written.
    """
    where = {visual: example.where for example in examples for visual in example.encoded}
    missing = cache.missing(where)
    vae = load_vae(part, numerics, with_encoders=True) if missing else None
    for visual in track(missing) if missing else ():
        with naming(where[visual]):
            found = vae.encode(vae_pixels(read_visual(visual.path, visual.kind).pixels, resolution))
        mx.eval(found)
        cache.add(visual, found._asdict())


def look(examples: Iterable[Example], cache: Cache, model: Lance, resolution: int, track: Tracker = iter) -> None:
    """Fill a cache with what a model's ViT makes of all that is looked at; raises LanceError as `encode`."""
    where = {visual: example.where for example in examples for visual in example.looked_at}
    for visual in track(cache.missing(where)):
        with naming(where[visual]):
            patches, grid = vit_patches(read_visual(visual.path, visual.kind).pixels, resolution)
        t, h, w = grid
        cells = t, h // MERGE_SIZE, w // MERGE_SIZE
        features = model.vit_model(mx.array(patches), [grid]).reshape(*cells, -1)
        mx.eval(features)
        cache.add(visual, {_FEATURES: features})


@dataclass(frozen=True, eq=False)
class Encoded:
    """Examples, and the caches that hold what the VAE and the ViT made of them.

    Attributes:
        digests: checksums of their files, by path.
    """

    examples: tuple[Example, ...]
    digests: Mapping[str, str]
    latents: Cache
    features: Cache

    @property
    def digest(self) -> str:
        """A checksum of all that is learned, whatever its files are called."""
        found = hashlib.sha256()
        for example in self.examples:
            files = [self.digests[visual.path] for visual in (*example.looked_at, *example.encoded)]
            texts = [getattr(example.request, name, None) for name in _TEXTS]
            found.update(json.dumps([example.task, texts, files]).encode())
        return found.hexdigest()

    def check(self) -> None:
        """Raise LanceError for the first drawing of a size that cannot be drawn, naming it."""
        for example in self.examples:
            if example.target:
                with naming(example.where or example.target.path):
                    self._sized(example)

    def sample(
        self,
        number: int,
        key: mx.array,
        tokenizer: LanceTokenizer,
        tokens_per_second: int,
        dtype: mx.Dtype,
        dropped: Collection[Role] = (),
        as_upstream: bool = False,
    ) -> Sample:
        """An example as a sample.

        Args:
            key: what its latents are drawn by.
            dtype: of what the ViT made.
            dropped, as_upstream: as for `drawing_sample` and `answering_sample`.
        """
        example = self.examples[number]
        visuals = [self._prepared(visual, bool(example.encoded)) for visual in example.looked_at]
        seen = [self.features[visual][_FEATURES].read(dtype) for visual in example.looked_at]
        vit = [features.reshape(-1, features.shape[-1]) for features in seen]
        if isinstance(example.request, Question):
            return answering_sample(example.request, tokenizer, tokens_per_second, visuals, vit, as_upstream)
        latents = []
        for visual, own in zip(example.encoded, mx.random.split(key, len(example.encoded)), strict=True):
            tensors = self.latents[visual]
            statistics = LatentStatistics(*(tensors[name].read(mx.float32) for name in LatentStatistics._fields))
            latents.append(statistics.sample(mx.random.normal(statistics.mean.shape, key=own)))
        request = self._sized(example)
        return drawing_sample(request, tokenizer, tokens_per_second, latents, visuals, vit, dropped, as_upstream)

    def _sized(self, example: Example) -> Request:
        frames, rows, columns, _ = self.latents[example.target]["mean"].shape
        size = {"height": SPATIAL_STRIDE * rows, "width": SPATIAL_STRIDE * columns}
        return replace(example.request, num_frames=num_decoded_frames(frames), **size)

    def _prepared(self, visual: Visual, encoded: bool) -> PreparedVisual:
        t, h, w, _ = self.features[visual][_FEATURES].shape
        pixels = None
        if encoded:
            # Only its size is looked at.
            frames, rows, columns, _ = self.latents[visual]["mean"].shape
            shape = num_decoded_frames(frames), SPATIAL_STRIDE * rows, SPATIAL_STRIDE * columns, 3
            pixels = np.broadcast_to(np.float32(0), shape)
        return PreparedVisual(None, (t, MERGE_SIZE * h, MERGE_SIZE * w), pixels)
