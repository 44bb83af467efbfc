"""Videos in: sampled as upstream samples them, decoded by FFmpeg frame by frame."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideDataType

from lance_mlx.config import TEMPORAL_STRIDE
from lance_mlx.errors import LanceError, reason
from lance_mlx.media.colour import HDR, tone_map
from lance_mlx.media.frames import Frames, check_size

SAMPLE_FPS = 12
MAX_SECONDS = 6
# What the file does not tell, as upstream assumes it.
DEFAULT_FPS = 24
_SIDE_DATA_KINDS = 64
"""More than FFmpeg has."""


def sample_indices(num_frames: int, fps: int) -> list[int]:
    """Frame numbers that stand for a video of `num_frames` frames at `fps` frames per second: 4k + 1 of them.

    The count is that of 12 frames a second over at most 6 seconds; the frames are spread evenly over the whole video,
    so a longer one is seen sped up. Upstream fails where the duration rounds to no frame; here that is one frame.
    Source: `bytedance/Lance data/video/sampler/frames.py:MultiClipsFrameSampler`.
    """
    wanted = round(min(num_frames / fps, MAX_SECONDS) * SAMPLE_FPS)
    # A multiple of four loses three frames, any other count is rounded down to 4k + 1.
    count = max((wanted - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1, 1)
    return np.linspace(0, num_frames - 1, count, dtype=int).tolist()


def read_video(path: Path, as_upstream: bool) -> Frames:
    """The sampled frames of a video, as `lance_mlx.media.read.read_visual` has it."""
    with _video_errors(path):
        num_frames, average_rate = _count_frames(path, as_upstream)
    # Below half a frame a second upstream would divide by zero.
    fps = max(round(float(average_rate)), 1) if average_rate else DEFAULT_FPS
    while num_frames:
        indices = sample_indices(num_frames, fps)
        with _video_errors(path):
            pixels, decoded = _decode(path, indices, as_upstream)
        if decoded > indices[-1]:
            return Frames(pixels, path, "video", tuple(indices), num_frames, fps)
        # Some packets gave no frame, such as those before the first key frame: sample what there is.
        num_frames = decoded
    raise LanceError(f"video {path} holds no frame")


def _count_frames(path: Path, as_upstream: bool) -> tuple[int, Fraction | None]:
    """Frames that will be shown and their average rate, from the packets: headers may lie or be silent."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise LanceError(f"video {path} holds no video stream")
        if "mp4" in container.format.name:
            _check_whole(path)
        stream = container.streams.video[0]
        if stream.codec_context is not None and stream.codec_context.width == 0:
            raise _no_video(path)
        if stream.codec_context is None:
            raise LanceError(f"video {path} is in a codec that FFmpeg does not read here: save it as H.264")
        check_size("video", path, *shown_size(stream, stream.codec_context, as_upstream))
        count = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))
        return count, stream.average_rate


def shown_size(
    stream: av.VideoStream, stored: av.VideoFrame | av.VideoCodecContext, as_upstream: bool = False
) -> tuple[int, int]:
    """Height and width of a video with square pixels, no less than what is stored; not yet turned."""
    aspect = stream.sample_aspect_ratio
    if as_upstream or not aspect:
        return stored.height, stored.width
    return round(stored.height * max(1 / aspect, 1)), round(stored.width * max(aspect, 1))


def _decode(path: Path, indices: Sequence[int], as_upstream: bool) -> tuple[np.ndarray | None, int]:
    """The frames of the non-decreasing `indices`, uint8 [t, H, W, 3], and how many frames were decoded for them."""
    pixels, filled, decoded = None, 0, 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames = container.decode(stream)
        for frame in frames if as_upstream else _progressive(frames):
            if decoded == indices[filled]:
                if pixels is None:
                    height, width = shown_size(stream, frame, as_upstream)
                    turn = _display_axes(frame)
                    pixels = np.empty((len(indices), *_turn(np.empty((height, width, 3)), turn).shape), np.uint8)
                # A stream may change its size; its first frame decides.
                hdr = frame.color_trc in HDR and not as_upstream
                # Planes for HDR: FFmpeg's packed pixels of more than 8 bits come out wrong in part.
                rgb = frame.to_ndarray(format="gbrp10le" if hdr else "rgb24", width=width, height=height)
                primaries = stream.codec_context.color_primaries
                rgb = _turn(tone_map(rgb, frame.color_trc, primaries) if hdr else rgb, turn)
                while filled < len(indices) and indices[filled] == decoded:
                    pixels[filled] = rgb
                    filled += 1
            decoded += 1
            if filled == len(indices):
                break
    return pixels, decoded


def _progressive(frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """As many frames, those that hold two fields filled up by FFmpeg's bwdif from their neighbours."""
    # A filter takes frames of one form.
    for _, alike in groupby(frames, lambda frame: (frame.width, frame.height, frame.format.name)):
        graph = None
        for frame in alike:
            if graph is None and frame.interlaced_frame:
                graph = av.filter.Graph()
                source = graph.add_buffer(template=frame)
                graph.link_nodes(source, graph.add("bwdif", "send_frame:auto:interlaced"), graph.add("buffersink"))
                graph.configure()
            if graph is None:
                yield frame
            else:
                graph.push(frame)
                yield from _filtered(graph)
        if graph is not None:
            graph.push(None)
            yield from _filtered(graph)


def _filtered(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    with suppress(av.error.BlockingIOError, av.error.EOFError):
        while True:
            yield graph.pull()


def _display_axes(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Whether to swap rows and columns, then to reverse the rows, then the columns, to show `frame` upright."""
    data = _side_data(frame).get(SideDataType.DISPLAYMATRIX)
    if data is None:
        return False, False, False
    # A pixel at (x, y) is shown at (a * x + c * y, b * x + d * y).
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].astype(int)
    if abs(b) > abs(a):
        return True, b < 0, c < 0
    return False, d < 0, a < 0


def _side_data(frame: av.VideoFrame) -> SideDataContainer:
    """What goes with a frame, but for the kinds that PyAV cannot name, such as EXIF: with one it can read none."""
    with suppress(ValueError):
        return frame.side_data
    named = {kind.value for kind in SideDataType}
    graph = av.filter.Graph()
    source = graph.add_buffer(template=frame)
    without = (graph.add("sidedata", f"delete:{kind}") for kind in range(_SIDE_DATA_KINDS) if kind not in named)
    graph.link_nodes(source, *without, graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull().side_data


def _turn(pixels: np.ndarray, axes: tuple[bool, bool, bool]) -> np.ndarray:
    swap, reverse_rows, reverse_columns = axes
    if swap:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if reverse_rows else 1, :: -1 if reverse_columns else 1]


def _check_whole(path: Path) -> None:
    """Refuse an MP4 whose frames or index end early, which FFmpeg may read as a shorter video."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 0
        while len(header := file.read(16)) >= 8:
            length = int.from_bytes(header[:4])
            if length == 1:
                length = int.from_bytes(header[8:])
            if header[4:8] in (b"mdat", b"moov") and start + length > size:
                raise LanceError(f"video {path} is cut short by at least {start + length - size} bytes: copy it again")
            if length < 8:  # 0: up to the end of the file
                return
            start += length
            file.seek(start)


def is_video(path: Path) -> bool:
    """Whether there is a video in a file that can be read."""
    with suppress(LanceError), _video_errors(path):
        return _count_frames(path, as_upstream=True)[0] > 0
    return False


def _no_video(path: Path) -> LanceError:
    return LanceError(f"{path} is no video, or it is damaged or cut short")


@contextmanager
def _video_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except av.error.InvalidDataError:
        raise _no_video(path) from None
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise LanceError(f"cannot read video {path}, it may be damaged or cut short: {reason(error)}") from error
