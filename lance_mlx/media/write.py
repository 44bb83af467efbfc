"""PNG, MP4 and text out: 8-bit pixels, files that appear only when they are whole, the request kept in the metadata."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, PngImagePlugin

from lance_mlx.errors import LanceError

METADATA_KEY = "lance-mlx"
# libx264's scale: 0 is lossless, 23 the default; 18 is commonly taken as visually transparent.
VIDEO_CRF = 18


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Map float pixels in [-1, 1], any shape, to uint8 by round((x / 2 + 0.5) * 255), clipping what lies outside.

    Raises LanceError for NaN or infinite pixels. Source: `bytedance/Lance common/val/utils.py`.
    """
    pixels = np.asarray(pixels, dtype=np.float32)
    if not np.isfinite(pixels).all():
        raise LanceError("the decoded pixels hold NaN or infinite values; the checkpoint or the noise is unusable")
    return np.clip(np.round((pixels * 0.5 + 0.5) * 255), 0, 255).astype(np.uint8)


def check_output(path: str | os.PathLike[str], num_frames: int) -> Path:
    """Return `path` if an output of `num_frames` frames can go there: .png takes one frame, .mp4 several.

    Raises LanceError for an unknown suffix, one that does not go with the number of frames, a missing folder and one
    that cannot be written to.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".png", ".mp4"):
        raise LanceError(f"output {path}: unknown suffix {path.suffix!r}; use .png for an image, .mp4 for a video")
    if suffix == ".png" and num_frames > 1:
        raise LanceError(f"output {path}: a .png holds one frame, not {num_frames}; use .mp4")
    if suffix == ".mp4" and num_frames == 1:
        raise LanceError(f"output {path}: one frame is an image; use .png")
    return _check_place(path)


def check_text_output(path: str | os.PathLike[str]) -> Path:
    """Return `path` if a text can go there; raises LanceError as `check_output`, and for the suffix of a picture."""
    path = Path(path)
    if path.suffix.lower() in (".png", ".mp4"):
        raise LanceError(f"output {path}: an answer is text; use .txt")
    return _check_place(path)


def _check_place(path: Path) -> Path:
    if path.is_dir():
        raise LanceError(f"output {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise LanceError(f"output {path}: the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise LanceError(f"output {path}: the folder {path.parent} cannot be written to; choose another one")
    return path


def save_image(path: str | os.PathLike[str], frame: np.ndarray, metadata: Mapping[str, Any]) -> None:
    """Write `frame`, uint8 [H, W, 3], as a PNG with `metadata` as JSON in its text chunk "lance-mlx".

    Raises LanceError for a frame of another shape or dtype and when the file cannot be written.
    """
    path = Path(path)
    _check_frame(frame)
    info = PngImagePlugin.PngInfo()
    info.add_text(METADATA_KEY, json.dumps(dict(metadata)))
    with _write_errors(path):
        temporary = _temporary(path)
        try:
            Image.fromarray(frame).save(temporary, format="PNG", pnginfo=info)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def save_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8; raises LanceError when the file cannot be written."""
    path = Path(path)
    with _write_errors(path):
        temporary = _temporary(path)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


class VideoWriter:
    """Write an H.264 MP4 frame by frame; the file appears under its name only when the `with` block ends cleanly.

    The metadata is kept as JSON in the comment tag. Leaving the block by an exception (KeyboardInterrupt included)
    removes what was written. Raises LanceError for fps <= 0, unusable or missing frames, and when writing fails.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float, metadata: Mapping[str, Any]) -> None:
        if not fps > 0:
            raise LanceError(f"fps must be positive, not {fps}")
        self.path = Path(path)
        self._rate = Fraction(fps).limit_denominator(1001)
        self._comment = json.dumps({METADATA_KEY: dict(metadata)})
        self._temporary = _temporary(self.path)
        self._container: av.container.OutputContainer | None = None
        self._stream: av.VideoStream | None = None

    def __enter__(self) -> Self:
        with _write_errors(self.path):
            self._container = av.open(str(self._temporary), "w", format="mp4", options={"movflags": "+faststart"})
        self._container.metadata["comment"] = self._comment
        return self

    def write(self, frame: np.ndarray) -> None:
        """Encode one frame, uint8 [H, W, 3] with even H and W, all frames of the same size."""
        _check_frame(frame)
        height, width, _ = frame.shape
        if self._stream is None:
            self._stream = self._add_stream(height, width)
        first = f"{self._stream.width}x{self._stream.height}"
        if f"{width}x{height}" != first:
            raise LanceError(f"video frames must be of one size: got {width}x{height} after {first}")
        image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU601,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
        )
        with _write_errors(self.path):
            self._container.mux(self._stream.encode(image))

    def _add_stream(self, height: int, width: int) -> av.VideoStream:
        # yuv420p stores one colour sample for 2x2 pixels.
        if height % 2 or width % 2:
            raise LanceError(f"video frames must have even width and height, not {width}x{height}")
        stream = self._container.add_stream("libx264", rate=self._rate, options={"crf": str(VIDEO_CRF)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Said in the file, since players otherwise guess the matrix from the height.
        stream.codec_context.colorspace = Colorspace.ITU601
        stream.codec_context.color_range = ColorRange.MPEG
        return stream

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            try:
                self._container.close()
            except av.error.FFmpegError:
                pass  # the first error is the one to report, and the file goes away
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._stream is None:
            raise LanceError(f"no frame was written to {self.path}")
        with _write_errors(self.path):
            self._container.mux(self._stream.encode(None))
            self._container.close()
            os.replace(self._temporary, self.path)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that `save_image` or `VideoWriter` put into the PNG or MP4 at `path`.

    Raises LanceError when the file cannot be read or holds no such metadata.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".mp4":
            with av.open(str(path)) as container:
                metadata = json.loads(container.metadata.get("comment", "null"))
            metadata = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
        else:
            with Image.open(path) as image:
                metadata = json.loads(getattr(image, "text", {}).get(METADATA_KEY, "null"))
    except json.JSONDecodeError:
        metadata = None
    except (OSError, av.error.FFmpegError) as error:
        raise LanceError(f"cannot read {path}: {_reason(error)}") from error
    if not isinstance(metadata, dict):
        raise LanceError(f"{path} holds no request written by lance-mlx")
    return metadata


def _check_frame(frame: np.ndarray) -> None:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise LanceError(f"a frame is uint8 [H, W, 3], not {frame.dtype} {list(frame.shape)}")


def _temporary(path: Path) -> Path:
    # In the same folder, so that the final rename cannot cross file systems.
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Turn what the file system and FFmpeg raise into one line naming the output."""
    try:
        yield
    except (OSError, av.error.FFmpegError) as error:
        raise LanceError(f"cannot write {path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
