"""Pictures and videos that clients send: kept in a folder of the job, checked before the job is queued."""

import base64
import binascii
import re
import warnings
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import av
from PIL import Image

from lance_mlx.errors import LanceError
from lance_mlx.media.read import read_visual, reads_heic
from lance_mlx.media.video import shown_size
from lance_mlx.requests.request import Visual, VisualKind
from lance_mlx.serve.bounds import BOUNDS
from lance_mlx.serve.errors import ApiError

_IMAGES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# What FFmpeg reads beyond these may be a list of other files, which it would open.
_VIDEOS = {"mp4": rb"....(ftyp|moov|mdat|wide|free|skip)", "mkv": rb"\x1aE\xdf\xa3", "avi": rb"RIFF....AVI "}
_CHUNK = 1 << 20
_DECODING = Lock()
"""One file is decoded at a time, which bounds the memory that they take."""


def from_data_url(url: object, folder: Path, kind: VisualKind | None = None) -> Visual:
    """Keep what a data: URL holds; raises ApiError for another URL, a file that is too large or that is no visual."""
    if not isinstance(url, str):
        raise ApiError(400, "an image or a video is given as a data: URL, in text", "invalid_value")
    head, comma, data = url.partition(",")
    if not head.startswith("data:"):
        raise ApiError(400, "URLs and paths are not read: send the file itself, as a data: URL", "invalid_image_url")
    if not comma or not head.endswith(";base64"):
        raise ApiError(400, "a data: URL must be in base64: data:image/png;base64,...", "invalid_base64")
    if len(data) > BOUNDS.upload_bytes * 4 // 3 + 4:
        raise _too_large()
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "a data: URL is not in valid base64", "invalid_base64") from None
    path = _place(folder, "upload")
    path.write_bytes(content)
    return check(path, "upload", kind)


def from_file(file: BinaryIO, name: str | None, folder: Path, kind: VisualKind | None = None) -> Visual:
    """Keep an uploaded file; raises ApiError as `from_data_url`."""
    path, size = _place(folder, name), 0
    with path.open("wb") as kept:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            if size > BOUNDS.upload_bytes:
                raise _too_large()
            kept.write(chunk)
    return check(path, name, kind)


def check(path: Path, name: str | None, kind: VisualKind | None = None) -> Visual:
    """The visual in a file, which gets the suffix of what it holds.

    Args:
        name: what the client calls it.
        kind: what it must be; an image or a video when None.

    Raises:
        ApiError: it is neither, over a bound, or the command would not take it.
    """
    size = path.stat().st_size
    if size > BOUNDS.upload_bytes:
        raise _too_large()
    shown = _shown(name)
    if not size:
        raise ApiError(400, f"{shown} is empty", "invalid_image")
    found, suffix = _sniff(path)
    if found is None or kind not in (None, found):
        wanted = f"{kind} in a format" if kind else "image or video in a format"
        raise ApiError(400, f"{shown} is no {wanted} that is read here: save it as PNG, JPEG or MP4", "invalid_image")
    # FFmpeg looks at names too.
    path = path.rename(path.with_suffix(suffix))
    try:
        with _DECODING:
            _check_bounds(path, found, shown)
            read_visual(path, found)
    except LanceError as error:
        raise ApiError(400, str(error).replace(str(path), shown), "invalid_image") from None
    return Visual(str(path), found)


def _sniff(path: Path) -> tuple[VisualKind | None, str]:
    """What a file holds, by its first bytes, and the suffix for it."""
    with path.open("rb") as file:
        head = file.read(16)
    # Images first: AVIF and HEIC begin as MP4 does.
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=_images()) as image:
            return VisualKind.IMAGE, f".{image.format.lower()}"
    except Image.DecompressionBombError:
        raise _too_many_pixels("an image", BOUNDS.image_pixels) from None
    except Exception:  # whatever Pillow's parsers stumble over
        found = next((name for name, pattern in _VIDEOS.items() if re.match(pattern, head, re.DOTALL)), None)
        return (VisualKind.VIDEO, f".{found}") if found else (None, "")


def _images() -> tuple[str, ...]:
    return (*_IMAGES, "HEIF") if reads_heic() else _IMAGES


def _check_bounds(path: Path, kind: VisualKind, shown: str) -> None:
    """Refuse a file that would take too much memory or time to decode, before it is."""
    if kind is VisualKind.IMAGE:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=_images()) as image:
            width, height = image.size
        if width * height > BOUNDS.image_pixels:
            raise _too_many_pixels(f"{shown}, {width}x{height},", BOUNDS.image_pixels)
        return
    try:
        with av.open(str(path)) as container:
            streams = container.streams.video
            if not streams or streams[0].codec_context is None:
                return  # which `read_visual` says better
            height, width = shown_size(streams[0], streams[0].codec_context)
            frames = 0
            for packet in container.demux(streams[0]):
                frames += packet.size > 0
                if frames > BOUNDS.frames:
                    raise ApiError(400, f"{shown} has more than {BOUNDS.frames} frames: cut it", "video_too_long")
    except (OSError, ValueError, av.error.FFmpegError):
        return
    if width * height > BOUNDS.frame_pixels:
        raise _too_many_pixels(f"{shown}, {width}x{height},", BOUNDS.frame_pixels)


def _place(folder: Path, name: str | None) -> Path:
    """A new file in the folder, called after what the client calls it."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", re.split(r"[/\\]", name or "")[-1].rsplit(".", 1)[0])[:40].strip("-")
    return folder / f"{len(list(folder.iterdir()))}-{stem or 'upload'}"


def _shown(name: str | None) -> str:
    """A client's name for a file, in a line."""
    printable = "".join(letter for letter in name or "the file" if letter.isprintable())
    return re.split(r"[/\\]", printable)[-1][:60] or "the file"


def _too_large() -> ApiError:
    megabytes = BOUNDS.upload_bytes >> 20
    return ApiError(413, f"a file may have at most {megabytes} MiB: make it smaller", "file_too_large")


def _too_many_pixels(what: str, most: int) -> ApiError:
    return ApiError(400, f"{what} has too many pixels: at most {most / 1e6:.0f} million", "too_many_pixels")
