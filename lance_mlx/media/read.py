"""Images and videos in: 8-bit sRGB frames as they are shown."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from lance_mlx.errors import LanceError, reason
from lance_mlx.media.colour import to_srgb
from lance_mlx.media.frames import Frames, check_size
from lance_mlx.media.hdr import to_sdr
from lance_mlx.media.video import is_video, read_video

_HEIF = (".heic", ".heif", ".hif")


def read_visual(path: str | os.PathLike[str], kind: Literal["image", "video"], as_upstream: bool = False) -> Frames:
    """Read the image or the sampled frames of the video at `path`, as programs that show them do.

    HDR (HLG and PQ) is brought to sRGB by `tone_map`. An image is turned upright by its EXIF orientation, brought to
    sRGB by its colour profile, and put on white where it is transparent, also with grey or a key colour; 16-bit grey
    keeps its high byte; of an animation the first frame counts. A video is decoded in order, holding only the frames of
    `sample_indices`: interlaced frames are deinterlaced, pixels that are not square are stretched to the larger size,
    and the frame is turned and mirrored by its display matrix; sound is not looked at. Upstream counts frames, so a
    variable frame rate is sampled by number, not by time.

    Args:
        as_upstream: take the stored pixels as upstream does: nothing tone-mapped, no orientation, no colour profile,
            transparency of a palette or of RGBA alone, 16-bit grey clipped; a video neither deinterlaced nor stretched.
            Videos are turned all the same: so does decord, with which upstream reads them.

    Raises LanceError for a file that is missing, damaged, cut short, of another kind, without a frame, smaller than
    16 pixels or more than 16 times longer than wide. Source: `bytedance/Lance
    data/datasets_custom/validation_dataset.py:get_video_tensor_online`.
    """
    path = Path(path)
    if not path.exists():
        raise LanceError(f"{kind} {path} does not exist")
    if not path.is_file():
        raise LanceError(f"{kind} {path} is not a file")
    if path.stat().st_size == 0:
        raise LanceError(f"{kind} {path} is empty")
    return (_read_image if kind == "image" else read_video)(path, as_upstream)


def reads_heic() -> bool:
    """Have Pillow read HEIC, which it calls HEIF, and return whether it can: the extra `heif` brings what it needs."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _read_image(path: Path, as_upstream: bool) -> Frames:
    if path.suffix.lower() in _HEIF and not reads_heic():
        raise LanceError(f"image {path} is HEIC, which needs pillow-heif: pip install '.[heif]' in the checkout")
    # Pillow warns of the sizes that today's phones take, and of metadata that nothing is asked of.
    with warnings.catch_warnings(action="ignore"), _image_errors(path):
        with Image.open(path) as image:
            check_size("image", path, image.height, image.width)
            if image.mode == "F":
                raise LanceError(f"image {path} holds floating-point values, whose white is not known: save it as PNG")
            if as_upstream:
                shown = _on_white(image, ("P", "RGBA"))
            else:
                shown = _to_rgb(ImageOps.exif_transpose(to_sdr(path, image)))
            pixels = np.asarray(shown)
    return Frames(pixels[None], path, "image", (0,), 1, 0)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which TIFF and PNM give as 32
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    image = to_srgb(image)
    return _on_white(image, (image.mode,) if image.has_transparency_data else ())


def _on_white(image: Image.Image, transparent: Sequence[str]) -> Image.Image:
    """The picture in RGB, on white if it has one of the modes that count as transparent."""
    if image.mode not in transparent:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


@contextmanager
def _image_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except LanceError:
        raise
    except Image.UnidentifiedImageError as error:
        if is_video(path):
            raise LanceError(f"image {path} is a video: x2t_video and video_edit take one") from None
        raise LanceError(f"image {path} is in no format that Pillow reads: save it as PNG or JPEG") from error
    except Image.DecompressionBombError as error:
        raise LanceError(f"image {path} has too many pixels: make it smaller") from error
    except Exception as error:  # Pillow passes on whatever its parsers stumble over
        raise LanceError(f"cannot read image {path}, it may be damaged or cut short: {reason(error)}") from error
