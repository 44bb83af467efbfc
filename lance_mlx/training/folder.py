"""A folder of images with captions, and the latents that a VAE makes of them once."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from lance_mlx.backend.numerics import Numerics
from lance_mlx.checkpoint.safetensors import TensorInfo, read_header, read_notes, write_safetensors
from lance_mlx.checkpoint.tensors import Part
from lance_mlx.checkpoint.weights import load_vae
from lance_mlx.errors import LanceError, reason
from lance_mlx.files import opened, whole
from lance_mlx.media.preprocess import vae_pixels
from lance_mlx.media.read import read_visual
from lance_mlx.model.vae import LatentStatistics
from lance_mlx.requests.limits import check_text

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".heic", ".heif")
_CACHE = "latents.safetensors"


class Captioned(NamedTuple):
    """An image and its caption."""

    path: Path
    caption: str


@dataclass(frozen=True, eq=False)
class Encoded:
    """What a run learns from: the captions, and for each the distribution of its image's latents."""

    captions: tuple[str, ...]
    statistics: tuple[LatentStatistics, ...]

    @property
    def digest(self) -> str:
        """A checksum of all of it."""
        found = hashlib.sha256(json.dumps(self.captions).encode())
        for each in self.statistics:
            found.update(np.array(each.mean).tobytes() + np.array(each.logvar).tobytes())
        return found.hexdigest()


def read_folder(folder: Path) -> list[Captioned]:
    """The images of a folder with their captions, by name.

    Raises:
        LanceError: there is no such folder, it has no image, or an image has no caption.
    """
    if not folder.is_dir():
        raise LanceError(f"data {folder} is not a folder: name one of images with a .txt beside each")
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGES)
    if not images:
        raise LanceError(f"data {folder} holds no image: {', '.join(_IMAGES)} are read")
    found = []
    for path in images:
        beside = path.with_suffix(".txt")
        try:
            with opened(beside) as file:
                caption = " ".join(file.read().decode("utf-8-sig").split())
        except FileNotFoundError:
            raise LanceError(f"{path} has no caption: write one in {beside.name} beside it") from None
        except (OSError, UnicodeDecodeError) as error:
            raise LanceError(f"caption {beside} cannot be read ({reason(error)})") from None
        if not caption:
            raise LanceError(f"caption {beside} is empty")
        try:
            check_text("caption", caption)
        except LanceError as error:
            raise LanceError(f"{beside}: {error}") from None
        found.append(Captioned(path, caption))
    return found


def encode_folder(
    items: Sequence[Captioned],
    resolution: int,
    part: Part,
    numerics: Numerics,
    cache: Path,
    track: Callable[[list], Iterator] = iter,
) -> Encoded:
    """Encode the images of a folder, or take what was kept of them when nothing has changed since.

    Args:
        part: the VAE's tensors, which are read when something is to be encoded.
        cache: folder to keep latents in.
        track: wraps the images while they are encoded, as tqdm does.

    Raises:
        LanceError: an image cannot be used, or the cache cannot be written.
    """
    key = json.dumps([resolution, numerics.name, _vae_key(part), [_digest(item.path) for item in items]])
    path = cache / _CACHE
    captions = tuple(item.caption for item in items)
    kept = _kept(path, key, len(items))
    if kept is not None:
        return Encoded(captions, kept)
    vae, statistics = load_vae(part, numerics, with_encoders=True), []
    for item in track(list(items)):
        frames = read_visual(item.path, "image").pixels
        found = vae.encode(vae_pixels(frames, resolution))
        mx.eval(found)
        statistics.append(found)
    arrays = {f"{i}.{kind}": np.array(getattr(each, kind)) for i, each in enumerate(statistics)
              for kind in each._fields}  # fmt: skip
    try:
        with whole(path) as beside, beside.open("wb") as file:
            infos = {name: TensorInfo("float32", array.shape) for name, array in arrays.items()}
            write_safetensors(file, infos, lambda name: [arrays[name]], {"key": key})
    except OSError as error:
        raise LanceError(f"{path} cannot be written ({error.strerror})") from None
    return Encoded(captions, tuple(statistics))


def _kept(path: Path, key: str, count: int) -> tuple[LatentStatistics, ...] | None:
    """What a cache holds; None where it is damaged or of something else, and will be written anew."""
    try:
        tensors = read_header(path)
        if read_notes(path).get("key") != key:
            return None
        read = [[tensors[f"{i}.{kind}"].read(mx.float32) for kind in LatentStatistics._fields] for i in range(count)]
    except (LanceError, KeyError):
        return None
    return tuple(LatentStatistics(*each) for each in read)


def _vae_key(part: Part) -> list:
    files = sorted({tensor.path for tensor in part.tensors.values()})
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _digest(path: Path) -> str:
    try:
        with opened(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LanceError(f"image {path} cannot be read ({error.strerror})") from None
