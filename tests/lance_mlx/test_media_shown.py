"""Media as people have them are read as they are shown, and with `as_upstream` as they are stored."""

import os
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc
from PIL import Image

from lance_mlx.errors import LanceError
from lance_mlx.media.read import read_visual

INTERLACED = 1 << 29 | 1 << 18
"""FFmpeg's flags of an encoder: estimate motion and transform by fields."""
BT2020_MATRIX = 9
"""Of conversions and in files; av 17 has no name for it."""
D65 = (0.3127, 0.3290)
BT709 = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
BT2020 = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))
P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))


def to_xyz(primaries: tuple) -> np.ndarray:
    """The matrix from linear light of the primaries with white D65."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    x, y = D65
    return columns * np.linalg.solve(columns, (x / y, 1, (1 - x - y) / y))


def linear(rgb: tuple) -> np.ndarray:
    values = np.array(rgb) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def hdr_signal(rgb: tuple, transfer: ColorTrc, primaries: tuple = BT2020) -> np.ndarray:
    """An sRGB colour in an HDR picture whose white page has 203 nits, in [0, 1]."""
    nits = 203 * np.linalg.solve(to_xyz(primaries), to_xyz(BT709) @ np.maximum(linear(rgb), 1e-9))
    if transfer is ColorTrc.SMPTE2084:
        power = (nits / 10000) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    shown = nits / 1000
    scene = shown * (shown @ (0.2627, 0.6780, 0.0593)) ** (1 / 1.2 - 1)
    above = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), above)


def hdr_frame(signal: np.ndarray) -> av.VideoFrame:
    """Of 10 bits in limited range, by the formula of BT.2020: FFmpeg's own conversion has its errors."""
    red, green, blue = np.moveaxis(signal, -1, 0)
    luma = 0.2627 * red + 0.6780 * green + 0.0593 * blue
    chroma = ((difference[::2, ::2] * 896 + 512) for difference in ((blue - luma) / 1.8814, (red - luma) / 1.4746))
    frame = av.VideoFrame(signal.shape[1], signal.shape[0], "yuv420p10le")
    for plane, values in zip(frame.planes, (luma * 876 + 64, *chroma), strict=True):
        padded = np.zeros((plane.height, plane.line_size // 2), "<u2")
        padded[:, : plane.width] = np.round(values)
        plane.update(padded.tobytes())
    return frame


def write_video(
    path: Path,
    frames: list[np.ndarray],
    aspect: str | None = None,
    flags: int = 0,
    transfer: ColorTrc | None = None,
) -> Path:
    """Write sRGB frames, uint8, or those of HDR as floats in [0, 1], whose colours are the same in 2x2 pixels."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, context = "yuv420p10le" if transfer else "yuv420p", stream.codec_context
        context.flags |= flags
        if aspect:
            context.sample_aspect_ratio = Fraction(aspect)
        if transfer:
            context.color_trc, context.color_primaries = transfer, ColorPrimaries.BT2020
        context.colorspace = BT2020_MATRIX if transfer else Colorspace.ITU601
        for frame in frames:
            if transfer:
                image = hdr_frame(frame)
            else:
                image = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))
    return path


def halves(height: int, width: int) -> np.ndarray:
    """Red above, blue at the lower right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2] = 220, 30, 30
    pixels[height // 2 :, width // 2 :] = 30, 30, 220
    return pixels


@pytest.mark.parametrize(
    ("stored", "aspect", "shown"),
    [
        ((480, 320), "2", (480, 640)),
        ((48, 72), "4/3", (48, 96)),
        ((64, 96), "1/2", (128, 96)),
        ((64, 96), "1", (64, 96)),
    ],
)
def test_pixels_that_are_not_square_are_stretched(tmp_path, stored, aspect, shown):
    path = write_video(tmp_path / "a.mp4", [halves(*stored)], aspect)
    assert read_visual(path, "video", as_upstream=True).pixels.shape[1:3] == stored
    (pixels,) = read_visual(path, "video").pixels
    assert pixels.shape[:2] == shown
    assert np.abs(pixels.astype(int) - halves(*shown)).mean() < 4


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "mov", "avi"])
def test_frames_with_exif_are_turned_as_it_says(tmp_path, suffix, turn):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = turn, "a maker"
    photo, path = tmp_path / "photo.jpg", tmp_path / f"frame.{suffix}"
    Image.fromarray(halves(48, 64)).save(photo, exif=exif, subsampling=0, quality=95)
    if suffix == "jpg":
        path = photo
    else:
        with av.open(str(photo)) as source, av.open(str(path), "w") as container:
            stream = container.add_stream_from_template(source.streams.video[0])
            (packet,) = (packet for packet in source.demux() if packet.size)
            packet.stream = stream
            container.mux(packet)
    (upright,) = read_visual(photo, "image").pixels
    (shown,) = read_visual(path, "video").pixels
    assert shown.shape == upright.shape
    assert np.abs(shown.astype(int) - upright).mean() < 4


def test_a_shape_that_shows_nothing_is_refused_as_it_is_shown(tmp_path):
    path = write_video(tmp_path / "a.mp4", [halves(32, 64)], "9")
    with pytest.raises(LanceError, match="is 576x32 pixels, one side more than 16 times the other"):
        read_visual(path, "video")
    assert read_visual(path, "video", as_upstream=True).pixels.shape == (1, 32, 64, 3)


def moving(count: int, height: int = 64) -> list[np.ndarray]:
    """Interlaced frames of a bar that moves 8 pixels a frame, 4 from field to field."""
    frames = np.full((count, height, 160, 3), 20, np.uint8)
    for number, frame in enumerate(frames):
        for field in range(2):
            left = 8 * number + 4 * field
            frame[field::2, left : left + 24] = 230
    return list(frames)


def combing(pixels: np.ndarray) -> float:
    rows = pixels[..., 1].astype(int)
    return float(np.abs(2 * rows[..., 1:-1, :] - rows[..., :-2, :] - rows[..., 2:, :]).mean())


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_interlaced_frames_are_deinterlaced(tmp_path, suffix):
    path = write_video(tmp_path / f"a{suffix}", moving(12), flags=INTERLACED)
    stored, shown = (read_visual(path, "video", as_upstream) for as_upstream in (True, False))
    assert shown.indices == stored.indices and shown.pixels.shape == stored.pixels.shape
    assert combing(stored.pixels) > 15 and combing(shown.pixels) < 3
    # Frame by frame the bar is where one of the two fields has it.
    for number, frame in zip(shown.indices, shown.pixels, strict=True):
        assert abs(np.flatnonzero((frame[..., 1] > 125).mean(0) > 0.7).mean() - (8 * number + 13.5)) < 2.6


def test_a_stream_that_changes_its_size_and_fields_keeps_its_frames(tmp_path):
    parts = [
        write_video(tmp_path / "0.h264", moving(5)),
        write_video(tmp_path / "1.h264", moving(5), flags=INTERLACED),
        write_video(
            tmp_path / "2.h264", [np.flip(frame, 1).repeat(2, 1) for frame in moving(5, height=128)], flags=INTERLACED
        ),
    ]
    path = tmp_path / "a.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    frames = read_visual(path, "video")
    assert frames.num_source_frames == 15 and frames.pixels.shape[1:] == (64, 160, 3)
    assert combing(frames.pixels[-1]) < 3
    # The last bar, mirrored.
    assert abs(np.flatnonzero(frames.pixels[-1, 32, :, 1] > 125).mean() - (159 - 45.5)) < 2.6


@pytest.mark.parametrize("transfer", [ColorTrc.ARIB_STD_B67, ColorTrc.SMPTE2084], ids=["HLG", "PQ"])
@pytest.mark.parametrize("rgb", [(200, 60, 40), (40, 160, 60), (30, 40, 190), (128, 128, 128), (20, 20, 20), (0, 0, 0)])
def test_hdr_shows_colours_of_sdr_as_they_are(tmp_path, transfer, rgb):
    signal = hdr_signal(rgb, transfer)
    path = write_video(tmp_path / "a.mp4", [np.full((34, 72, 3), signal)], transfer=transfer)
    assert np.abs(read_visual(path, "video").pixels.astype(int) - rgb).max() <= 3
    # FFmpeg rounds down, channel by channel.
    assert np.abs(read_visual(path, "video", as_upstream=True).pixels - signal * 255).max() <= 3


@pytest.mark.parametrize("transfer", [ColorTrc.ARIB_STD_B67, ColorTrc.SMPTE2084], ids=["HLG", "PQ"])
def test_hdr_keeps_what_is_brighter_than_white_apart(tmp_path, transfer):
    signal = np.linspace(0, 1, 33)
    frame = np.broadcast_to(signal.repeat(16)[:, None], (64, 528, 3))
    path = write_video(tmp_path / "a.mp4", [frame], transfer=transfer)
    shown = read_visual(path, "video").pixels[0, 16, 8::16].astype(int)
    assert np.ptp(shown, axis=-1).max() <= 2
    grey = shown[:, 1]
    assert (np.diff(grey) >= -1).all() and grey[0] <= 1 and grey[-1] >= 254
    white = np.interp(hdr_signal((255, 255, 255), transfer)[0], signal, grey)
    assert 225 < white < 235
    peak = signal[-1] if transfer is ColorTrc.ARIB_STD_B67 else 0.7518  # PQ's of 1000 nits
    between = np.interp(np.linspace(hdr_signal((255, 255, 255), transfer)[0], peak, 5), signal, grey)
    assert (np.diff(between) >= 2).all()


def write_png(path: Path, pixels: np.ndarray, cicp: bytes, *more: bytes) -> Path:
    """A PNG of 8 or 16 bits a value with a chunk cICP, and further chunks."""
    height, width, channels = pixels.shape
    kind, big = {1: 0, 2: 4, 3: 2, 4: 6}[channels], pixels.astype(pixels.dtype.newbyteorder(">"))
    head = struct.pack(">2I5B", width, height, 8 * pixels.itemsize, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in big)
    chunks = (b"IHDR" + head, *more, b"cICP" + cicp, b"IDAT" + zlib.compress(rows), b"IEND")
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    return path


@contextmanager
def same_priority() -> Iterator[None]:
    """Where root runs it, SVT-AV1 gives its caller's thread real-time priority: all else on the machine would wait."""
    policy = os.sched_getscheduler(0) if sys.platform == "linux" else None
    try:
        yield
    finally:
        if policy is not None:
            os.sched_setscheduler(0, policy, os.sched_param(0))


def write_still(path: Path, signal: np.ndarray, transfer: ColorTrc) -> Path:
    """An HDR still of BT.2020: 16 bits in a PNG, 10 in an AVIF or a HEIC."""
    if path.suffix == ".png":
        return write_png(path, np.round(signal * 65535).astype(np.uint16), bytes((9, transfer, 0, 1)))
    if path.suffix == ".avif":
        with same_priority(), av.open(str(path), "w") as container:
            stream = container.add_stream("libsvtav1", options={"crf": "1"})
            stream.height, stream.width, stream.pix_fmt = *signal.shape[:2], "yuv420p10le"
            context = stream.codec_context
            context.color_trc, context.color_primaries = transfer, ColorPrimaries.BT2020
            context.colorspace = BT2020_MATRIX
            container.mux(stream.encode(hdr_frame(signal)))
            container.mux(stream.encode(None))
        return path
    heif = pytest.importorskip("pillow_heif", reason="HEIC needs its extra: pip install '.[heif]'")
    said = {"color_primaries": 9, "transfer_characteristics": int(transfer), "matrix_coefficients": 9}
    image = heif.from_bytes("RGB;16", signal.shape[1::-1], np.round(signal * 65535).astype("<u2").tobytes())
    image.save(path, quality=100, full_range_flag=1, **said)
    return path


@pytest.mark.parametrize("transfer", [ColorTrc.ARIB_STD_B67, ColorTrc.SMPTE2084], ids=["HLG", "PQ"])
@pytest.mark.parametrize("suffix", [".png", ".avif", ".heic"])
@pytest.mark.parametrize("rgb", [(200, 60, 40), (30, 40, 190), (128, 128, 128), (0, 0, 0)])
def test_hdr_stills_show_colours_of_sdr_as_they_are(tmp_path, suffix, transfer, rgb):
    signal = hdr_signal(rgb, transfer)
    path = write_still(tmp_path / f"a{suffix}", np.full((64, 96, 3), signal), transfer)
    assert np.abs(read_visual(path, "image").pixels.astype(int) - rgb).max() <= 3
    stored = read_visual(path, "image", as_upstream=True).pixels
    assert np.array_equal(stored[0], np.asarray(Image.open(path).convert("RGB")))


def test_an_hdr_still_is_shown_as_a_video_of_it(tmp_path):
    light = np.broadcast_to(np.linspace(0, 1, 33).repeat(16)[:, None], (64, 528, 3))
    (still,) = read_visual(write_still(tmp_path / "a.png", light, ColorTrc.SMPTE2084), "image").pixels.astype(int)
    video = write_video(tmp_path / "a.mp4", [light], transfer=ColorTrc.SMPTE2084)
    assert np.abs(still[:, 8::16] - read_visual(video, "video").pixels[0, :, 8::16]).max() <= 3


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_an_hdr_png_is_turned_and_put_on_white(tmp_path, dtype, channels):
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb, most = (128, 128, 128) if channels < 3 else (200, 60, 40), np.iinfo(dtype).max
    signal = np.round(hdr_signal(rgb, ColorTrc.SMPTE2084) * most).astype(dtype)
    pixels = np.zeros((32, 48, channels), dtype)
    pixels[..., : min(channels, 3) if channels != 2 else 1] = signal[: 3 if channels > 2 else 1]
    if channels in (2, 4):
        pixels[:16, :, -1] = most
    turned = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    path = write_png(tmp_path / "a.png", pixels, bytes((9, 16, 0, 1)), turned)
    (shown,) = read_visual(path, "image").pixels.astype(int)
    # Of PQ's 8 bits one is four of sRGB's here.
    assert shown.shape == (48, 32, 3) and np.abs(shown[:, 16:] - rgb).max() <= (6 if dtype is np.uint8 else 2)
    if channels in (2, 4):
        assert (shown[:, :16] == 255).all()


def test_an_hdr_png_of_8_bits_is_that_of_16_with_the_same_light(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).repeat(32).reshape(256, 32, 1).repeat(3, -1)
    few, many = (
        read_visual(write_png(tmp_path / "a.png", each, bytes((9, 16, 0, 1))), "image").pixels.astype(int)
        for each in (pixels, pixels.astype(np.uint16) * 257)
    )
    assert np.abs(few - many).max() <= 1


@pytest.mark.parametrize(("number", "primaries"), [(1, BT709), (9, BT2020), (12, P3)])
def test_an_hdr_png_has_the_primaries_that_it_says(tmp_path, number, primaries):
    signal = hdr_signal((200, 60, 40), ColorTrc.SMPTE2084, primaries)
    pixels = np.round(np.full((32, 32, 3), signal) * 65535).astype(np.uint16)
    shown = read_visual(write_png(tmp_path / "a.png", pixels, bytes((number, 16, 0, 1))), "image").pixels
    assert np.abs(shown.astype(int) - (200, 60, 40)).max() <= 2


def test_a_png_that_is_not_hdr_stays_what_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    for cicp in (bytes((1, 13, 0, 1)), b"", bytes((9, 16))):
        path = write_png(tmp_path / "a.png", pixels, cicp)
        assert np.array_equal(read_visual(path, "image").pixels[0], pixels)


def profile(space: bytes, tags: Mapping[str, bytes]) -> bytes:
    """An ICC profile of version 2."""
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name.encode(), start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"", 0x02400000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H4s28x", 2024, 1, 1, 0, 0, 0, b"acsp") + xyz((0.9642, 1, 0.8249))[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz(values: tuple) -> bytes:
    return struct.pack(">4s4x3i", b"XYZ ", *(round(value * 65536) for value in values))


def curve(values: np.ndarray) -> bytes:
    return struct.pack(f">4s4xI{len(values)}H", b"curv", len(values), *np.round(values * 65535).astype(int))


def rgb_profile(primaries: tuple) -> bytes:
    """A profile with sRGB's curve, as Display P3's."""
    bradford = np.array([(0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296)])
    from_white = bradford @ to_xyz(primaries) @ np.ones(3)
    adapt = np.linalg.solve(bradford, np.diag(bradford @ (0.9642, 1, 0.8249) / from_white) @ bradford)
    columns = (adapt @ to_xyz(primaries)).T
    tags = {f"{name}XYZ": xyz(column) for name, column in zip("rgb", columns, strict=True)}
    response = curve(linear(np.linspace(0, 255, 1024)))
    return profile(b"RGB ", tags | {f"{name}TRC": response for name in "rgb"} | {"wtpt": xyz((0.9642, 1, 0.8249))})


GREY = profile(b"GRAY", {"wtpt": xyz((0.9642, 1, 0.8249)), "kTRC": curve(np.linspace(0, 1, 256) ** 1.8)})


def in_p3(rgb: tuple) -> tuple:
    light = np.linalg.solve(to_xyz(P3), to_xyz(BT709) @ linear(rgb))
    return tuple(
        np.round(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)).astype(int)
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff"])
@pytest.mark.parametrize("rgb", [(200, 60, 40), (255, 0, 0), (20, 130, 60), (90, 90, 90)])
def test_a_colour_profile_counts(tmp_path, suffix, rgb):
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (32, 48), tuple(map(int, in_p3(rgb)))).save(path, icc_profile=rgb_profile(P3), quality=100)
    assert np.abs(read_visual(path, "image").pixels.astype(int) - rgb).max() <= 3
    assert np.abs(read_visual(path, "image", as_upstream=True).pixels.astype(int) - in_p3(rgb)).max() <= 2


def test_a_profile_of_srgb_changes_nothing(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=rgb_profile(BT709))
    assert np.array_equal(read_visual(tmp_path / "a.png", "image").pixels[0], pixels)


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_a_profile_counts_before_white_does(tmp_path, mode):
    image = Image.new("RGBA", (32, 32), (*map(int, in_p3((200, 60, 40))), 255))
    image.paste((0, 255, 0, 0), (16, 0, 32, 32))
    image.convert(mode).save(tmp_path / "a.png", icc_profile=rgb_profile(P3))
    pixels = read_visual(tmp_path / "a.png", "image").pixels[0].astype(int)
    assert (pixels[:, 16:] == 255).all() and np.abs(pixels[:, :16] - (200, 60, 40)).max() <= 3


def test_a_grey_profile_counts_for_grey_alone(tmp_path):
    for mode, shown in (("L", 156), ("LA", 156), ("RGB", 138)):
        Image.new("L", (32, 32), 138).convert(mode).save(tmp_path / f"{mode}.png", icc_profile=GREY)
        # 138 at gamma 1.8 is 156 in sRGB.
        assert np.abs(read_visual(tmp_path / f"{mode}.png", "image").pixels.astype(int) - shown).max() <= 1, mode


def test_a_damaged_profile_is_left_out_of_account(tmp_path):
    Image.new("RGB", (32, 32), (200, 60, 40)).save(tmp_path / "a.png", icc_profile=b"damaged")
    assert (read_visual(tmp_path / "a.png", "image").pixels == (200, 60, 40)).all()


def test_upstream_leaves_pictures_as_they_are_stored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("LA", (32, 48), (90, 0)).save(tmp_path / "a.png", exif=exif)
    assert read_visual(tmp_path / "a.png", "image").pixels.shape == (1, 32, 48, 3)
    stored = read_visual(tmp_path / "a.png", "image", as_upstream=True).pixels
    assert stored.shape == (1, 48, 32, 3) and (stored == 90).all()
    Image.new("RGBA", (32, 48), (90, 90, 90, 0)).save(tmp_path / "b.png")
    assert (read_visual(tmp_path / "b.png", "image", as_upstream=True).pixels == 255).all()
    Image.fromarray(np.full((32, 48), 300, np.uint16)).save(tmp_path / "c.png")
    assert (read_visual(tmp_path / "c.png", "image").pixels == 1).all()
    assert (read_visual(tmp_path / "c.png", "image", as_upstream=True).pixels == 255).all()
