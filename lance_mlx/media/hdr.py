"""HDR stills: what a PNG, an AVIF or a HEIC says of its light, and the signal that Pillow's 8 bits leave in part."""

from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from lance_mlx.media.colour import HDR, tone_map

_CICP = b"\0\0\0\4cICP"
"""Length and name of a PNG's chunk of H.273's four numbers."""


class _Signal(NamedTuple):
    """ITU-T H.273's numbers of a picture's primaries and transfer, and its pixels of 10 bits, uint16 [H, W, 3]."""

    primaries: int
    transfer: int
    pixels: np.ndarray


def to_sdr(path: Path, image: Image.Image) -> Image.Image:
    """The picture in sRGB by `tone_map`, with its transparency and orientation; itself where it is not HLG or PQ.

    Of a picture with a gain map the base is taken, which is SDR where there is a second rendition of HDR.

    Args:
        image: what Pillow opened at `path`, not turned.
    """
    read = {"PNG": _of_png, "AVIF": _of_avif, "HEIF": _of_heif}.get(image.format)
    signal = read(path, image) if read else None
    if signal is None:
        return image
    shown = Image.fromarray(tone_map(signal.pixels, signal.transfer, signal.primaries))
    if image.has_transparency_data:
        shown.putalpha(image.convert("RGBA").getchannel("A"))
    shown.info["exif"] = image.getexif().tobytes()
    return shown


def _of_png(path: Path, image: Image.Image) -> _Signal | None:
    """By its chunk cICP, which Pillow passes over."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
            if head == _CICP:
                primaries, transfer, *_ = file.read(4)
                return _Signal(primaries, transfer, _decoded(path, image)) if transfer in HDR else None
            file.seek(int.from_bytes(head[:4]) + 4, 1)
    return None


def _of_avif(path: Path, image: Image.Image) -> _Signal | None:
    with path.open("rb") as file, av.open(file) as container:
        said = container.streams.video[0].codec_context
        primaries, transfer = said.color_primaries, said.color_trc
    return _Signal(primaries, transfer, _decoded(path, image)) if transfer in HDR else None


def _of_heif(path: Path, image: Image.Image) -> _Signal | None:
    said = image.info.get("nclx_profile") or {}
    if said.get("transfer_characteristics") not in HDR:
        return None
    from pillow_heif import open_heif

    # 16 bits, of which those below the file's are 0.
    stored = np.asarray(open_heif(path, convert_hdr_to_8bit=False))
    pixels = stored[..., :3] >> 6 if stored.dtype == np.uint16 else _of_8_bits(image)
    return _Signal(said["color_primaries"], said["transfer_characteristics"], pixels)


def _decoded(path: Path, image: Image.Image) -> np.ndarray:
    """What FFmpeg decodes; Pillow's 8 bits where there are no more, which FFmpeg widens too dark, or of a tile."""
    with path.open("rb") as file, av.open(file) as container:
        frame = next(container.decode(video=0))
        if frame.format.components[0].bits == 8 or (frame.width, frame.height) != image.size:
            return _of_8_bits(image)
        return frame.to_ndarray(format="gbrp10le")


def _of_8_bits(image: Image.Image) -> np.ndarray:
    return np.round(np.asarray(image.convert("RGB")) * (1023 / 255)).astype(np.uint16)
