"""Images, videos and text out: 8-bit pixels, files that appear when they are whole, the request in their metadata."""

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from lance_mlx.errors import LanceError, reason
from lance_mlx.files import check_place, opened, whole, write_text

METADATA_KEY = "lance-mlx"
IMAGES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Pillow's names of the forms of an image, by suffix."""
VIDEOS = {".mp4": "mp4", ".mov": "mov", ".gif": "gif"}
"""FFmpeg's and Pillow's names of the forms of a video, by suffix."""
_IMAGE_SUFFIX, _VIDEO_SUFFIX = ".png, .jpg or .webp for an image", ".mp4, .mov or .gif for a video"
_TEXTS = ".txt", ".md", ""
_DESCRIPTION = 0x010E
"""EXIF's ImageDescription."""
_JPEG_METADATA, _GROWTH = 65_000, 1_000
"""Bytes of a JPEG's EXIF, and what may be added to a request's before it is written."""
# libx264's scale: 0 is lossless, 23 the default; 18 is commonly taken as visually transparent.
VIDEO_CRF = 18
# ITU-T H.273's number of the matrix: av's `Colorspace.ITU601` is 5, of the same matrix, which QuickTime does not list.
# Not BT.709's, whose blue Chromium shows wrong by up to 12 where it converts on the CPU.
_BT601 = 6
# Blue from Cb lies between BT.601's 1.772 * 255 / 224 and the 2 that Chromium takes on the CPU: flat colours come back
# within 2 of 255 by either.
_TO_RGB = np.array(
    (
        (255 / 219, 0, 1.402 * 255 / 224),
        (255 / 219, -0.344136 * 255 / 224, -0.714136 * 255 / 224),
        (255 / 219, (1.772 * 255 / 224 + 2) / 2, 0),
    )
)
"""From Y, Cb and Cr of limited range, less 16, 128 and 128."""
_TO_YUV = np.linalg.inv(_TO_RGB).T.astype(np.float32)


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Map float pixels in [-1, 1], any shape, to uint8 by round((x / 2 + 0.5) * 255), clipping what lies outside.

    Raises LanceError for NaN or infinite pixels. Source: `bytedance/Lance common/val/utils.py`.
    """
    pixels = np.asarray(pixels, dtype=np.float32)
    if not np.isfinite(pixels).all():
        raise LanceError("the decoded pixels hold NaN or infinite values; the checkpoint or the noise is unusable")
    return np.clip(np.round((pixels * 0.5 + 0.5) * 255), 0, 255).astype(np.uint8)


def check_output(
    path: str | os.PathLike[str], num_frames: int, overwrite: bool = True, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Return `path` if an output of `num_frames` frames can go there: one frame to an image, several to a video.

    Args:
        overwrite: let it take the place of a file.
        metadata: about what will be written into it, which a JPEG has little room for.

    Raises:
        LanceError: an unknown suffix, one that does not go with the number of frames, metadata that do not fit, or what
            `check_place` refuses.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (*IMAGES, *VIDEOS):
        raise LanceError(f"output {path}: unknown suffix {path.suffix!r}; use {_IMAGE_SUFFIX}, {_VIDEO_SUFFIX}")
    if suffix in IMAGES and num_frames > 1:
        raise LanceError(f"output {path}: a {suffix} holds one frame, not {num_frames}; use {_VIDEO_SUFFIX}")
    if suffix in VIDEOS and num_frames == 1:
        raise LanceError(f"output {path}: one frame is an image; use {_IMAGE_SUFFIX}")
    if IMAGES.get(suffix) == "JPEG" and len(json.dumps(dict(metadata or {}))) > _JPEG_METADATA - _GROWTH:
        raise LanceError(f"output {path}: a JPEG has no room for so long a request; use .png or .webp")
    return check_place(path, overwrite)


def check_text_output(path: str | os.PathLike[str], overwrite: bool = True) -> Path:
    """Return `path` if a text can go there; raises LanceError as `check_output`, and for a suffix of something else."""
    path = Path(path)
    if path.suffix.lower() not in _TEXTS:
        raise LanceError(f"output {path}: an answer is text; use .txt or .md")
    return check_place(path, overwrite)


def save_image(path: str | os.PathLike[str], frame: np.ndarray, metadata: Mapping[str, Any]) -> None:
    """Write `frame`, uint8 [H, W, 3], in the form that the suffix names, with `metadata` as JSON.

    They are in a PNG's text chunk "lance-mlx", and in the EXIF description of a JPEG (quality 95, all colour kept) or a
    WebP (lossless). Raises LanceError for a frame of another shape or dtype and when the file cannot be written.
    """
    path = Path(path)
    _check_frame(frame)
    form, options = IMAGES[path.suffix.lower()], {}
    if form == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text(METADATA_KEY, json.dumps(dict(metadata)))
    else:
        options |= {"quality": 95, "subsampling": 0} if form == "JPEG" else {"lossless": True}
        options["exif"] = Image.Exif()
        options["exif"][_DESCRIPTION] = json.dumps({METADATA_KEY: dict(metadata)})
    with _write_errors(path), whole(path) as part:
        Image.fromarray(frame).save(part, format=form, **options)


def save_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8; raises LanceError when the file cannot be written."""
    with _write_errors(Path(path)):
        write_text(Path(path), text)


def save_video(
    path: str | os.PathLike[str], frames: Iterable[np.ndarray], fps: float, metadata: Mapping[str, Any]
) -> None:
    """Write a video frame by frame, in the form that the suffix names; the file appears when it is whole.

    MP4 and MOV hold H.264, marked as sRGB in the matrix of BT.601. A GIF has 256 colours a frame, its time in
    hundredths of a second, and is in memory until it is written. The metadata are kept as JSON in the comment.

    Args:
        frames: uint8 [H, W, 3] each, all of one size; H and W even for H.264.

    Raises:
        LanceError: a frame rate of 0 or less, unusable or missing frames, or the file cannot be written.
    """
    path = Path(path)
    if not fps > 0:
        raise LanceError(f"fps must be positive, not {fps}")
    form, comment = VIDEOS[path.suffix.lower()], json.dumps({METADATA_KEY: dict(metadata)})
    with _write_errors(path), whole(path) as part:
        written = (_write_gif if form == "gif" else _encode)(part, _of_one_size(frames), fps, form, comment)
        if not written:
            raise LanceError(f"no frame was written to {path}")


def _of_one_size(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    first = None
    for frame in frames:
        _check_frame(frame)
        size = f"{frame.shape[1]}x{frame.shape[0]}"
        first = first or size
        if size != first:
            raise LanceError(f"video frames must be of one size: got {size} after {first}")
        yield frame


def _write_gif(part: Path, frames: Iterator[np.ndarray], fps: float, form: str, comment: str) -> bool:
    """Write the frames; returns whether there were any."""
    pictures = [Image.fromarray(frame).quantize() for frame in frames]
    if pictures:
        # From the exact times, so that roundings do not add up.
        times = [round(100 * index / fps) for index in range(len(pictures) + 1)]
        durations = [10 * (end - start) for start, end in pairwise(times)]
        options = {"save_all": True, "append_images": pictures[1:], "duration": durations, "loop": 0}
        pictures[0].save(part, format=form, comment=comment.encode(), **options)
    return bool(pictures)


def _encode(part: Path, frames: Iterator[np.ndarray], fps: float, form: str, comment: str) -> bool:
    """Write the frames as H.264; returns whether there were any."""
    container = av.open(str(part), "w", format=form, options={"movflags": "+faststart"})
    try:
        container.metadata["comment"] = comment
        stream = None
        for frame in frames:
            if stream is None:
                stream = _add_stream(container, *frame.shape[:2], Fraction(fps).limit_denominator(1001))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_to_yuv(frame), format="yuv420p")))
        if stream is not None:
            container.mux(stream.encode(None))
            container.close()
        return stream is not None
    finally:
        # The first error is the one to report, and the file goes away.
        with suppress(av.error.FFmpegError):
            container.close()


def _to_yuv(frame: np.ndarray) -> np.ndarray:
    """The planes of YUV 4:2:0 below each other, uint8 [H * 3 / 2, W], rounded: FFmpeg's are not the nearest."""
    height, width, _ = frame.shape
    yuv = frame.astype(np.float32) @ _TO_YUV + np.float32((16, 128, 128))
    chroma = yuv.reshape(height // 2, 2, width // 2, 2, 3)[..., 1:].mean((1, 3))
    planes = [yuv[..., 0].ravel(), *np.moveaxis(chroma, 2, 0).reshape(2, -1)]
    return np.rint(np.concatenate(planes)).astype(np.uint8).reshape(height * 3 // 2, width)


def _add_stream(container: av.container.OutputContainer, height: int, width: int, rate: Fraction) -> av.VideoStream:
    # yuv420p stores one colour sample for 2x2 pixels.
    if height % 2 or width % 2:
        raise LanceError(f"video frames must have even width and height, not {width}x{height}")
    stream = container.add_stream("libx264", rate=rate, options={"crf": str(VIDEO_CRF)})
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    # Players guess what is not said, the matrix from the height; and Apple's show BT.709's transfer paler than sRGB's.
    stream.codec_context.color_primaries = ColorPrimaries.BT709
    stream.codec_context.color_trc = ColorTrc.IEC61966_2_1
    stream.codec_context.colorspace = _BT601
    stream.codec_context.color_range = ColorRange.MPEG
    return stream


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that `save_image` or `save_video` put into the file at `path`.

    Raises LanceError when the file cannot be read or holds no such metadata.
    """
    path = Path(path)
    try:
        with opened(path) as file:
            metadata = json.loads(_comment(path, file) or "null")
    except (UnidentifiedImageError, json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        metadata = None
    except Exception as error:  # Pillow and FFmpeg pass on whatever their parsers stumble over
        raise LanceError(f"cannot read {path}: {reason(error)}") from error
    if path.suffix.lower() != ".png" and isinstance(metadata, dict):
        metadata = metadata.get(METADATA_KEY)
    if not isinstance(metadata, dict):
        raise LanceError(f"{path} holds no request written by lance-mlx")
    return metadata


def _comment(path: Path, file: BinaryIO) -> str | bytes | None:
    """What stands where we write our metadata."""
    if VIDEOS.get(path.suffix.lower(), "gif") != "gif":
        with av.open(file) as container:
            return container.metadata.get("comment")
    # No pixel is read, however many there are.
    with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
        if image.format == "PNG":
            return image.text.get(METADATA_KEY)
        return image.info.get("comment") if image.format == "GIF" else image.getexif().get(_DESCRIPTION)


def _check_frame(frame: np.ndarray) -> None:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise LanceError(f"a frame is uint8 [H, W, 3], not {frame.dtype} {list(frame.shape)}")


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Turn what the file system and FFmpeg raise into one line naming the output."""
    try:
        yield
    except (OSError, av.error.FFmpegError) as error:
        raise LanceError(f"cannot write {path}: {reason(error)}") from error
