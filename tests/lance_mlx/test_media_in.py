"""Reading images and videos: upright RGB, upstream's choice of frames, one clear line for what cannot be used."""

import sys
import tracemalloc
import warnings
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lance_mlx.errors import LanceError
from lance_mlx.media.read import read_visual
from lance_mlx.media.video import sample_indices
from lance_mlx.media.write import read_metadata

ORIENTATION = 0x0112
# How the stored pixels of each EXIF orientation become upright.
UPRIGHT = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: np.rot90(p, 2),
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p, 2).swapaxes(0, 1),
    8: lambda p: np.rot90(p),
}
# a, b, c, d of the display matrix of the same eight: x' = a * x + c * y, y' = b * x + d * y.
MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def picture(height: int = 24, width: int = 40, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def quadrants(height: int = 32, width: int = 64) -> np.ndarray:
    """A picture that survives a codec and shows how it was turned."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = 240, 20, 20
    pixels[: height // 2, width // 2 :] = 20, 240, 20
    pixels[height // 2 :, : width // 2] = 20, 20, 240
    return pixels


def numbered(count: int, height: int = 32, width: int = 64) -> list[np.ndarray]:
    """Grey frames that tell their number."""
    return [np.full((height, width, 3), number, np.uint8) for number in range(count)]


def numbers(frames: np.ndarray) -> list[int]:
    # Limited range has fewer levels than there are numbers: off by one at most.
    return [round(float(frame.mean())) for frame in frames]


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    rate: Fraction | int = 30,
    times: Sequence[int] | None = None,
    colorspace: Colorspace = Colorspace.ITU601,
    faststart: bool = False,
    keyframes: int = 250,
) -> Path:
    """Write `frames` as H.264; `times` are their presentation times in milliseconds."""
    options = {"movflags": "+faststart"} if faststart else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(
            "libx264", rate=rate, options={"crf": "4", "g": str(keyframes), "sc_threshold": "0"}
        )
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = colorspace
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=colorspace)
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def set_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    data = bytearray(path.read_bytes())
    # Version 0 of the track header: 40 bytes lie between its name and the matrix.
    start = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    matrix = (a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    data[start : start + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(data)


def refusal(path: Path, kind: str) -> str:
    """The message about a file that cannot be used: one line that names it."""
    with pytest.raises(LanceError) as error:
        read_visual(path, kind)
    message = str(error.value)
    assert "\n" not in message and str(path) in message and kind in message
    return message


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path, orientation):
    stored, exif = picture(), Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(stored).save(tmp_path / "phone.png", exif=exif)
    frames = read_visual(tmp_path / "phone.png", "image")
    assert np.array_equal(frames.pixels[0], UPRIGHT[orientation](stored))


def test_a_phone_photo_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(np.rot90(quadrants())).save(tmp_path / "phone.jpg", exif=exif, quality=95)
    pixels = read_visual(tmp_path / "phone.jpg", "image").pixels
    assert pixels.shape == (1, 32, 64, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels[0].astype(int) - quadrants()).mean() < 4


def test_an_image_says_what_was_read(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    frames = read_visual(str(tmp_path / "a.png"), "image")
    assert (frames.path, frames.kind, frames.indices) == (tmp_path / "a.png", "image", (0,))
    assert (frames.num_source_frames, frames.source_fps) == (1, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_a_transparent_image_is_put_on_white(tmp_path, mode):
    stored = Image.fromarray(picture(channels=4), "RGBA").convert(mode)
    path = tmp_path / ("a.tiff" if mode == "PA" else "a.png")
    stored.save(path)
    rgba = np.asarray(stored.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(read_visual(path, "image").pixels[0] - expected).max() <= 1


def test_a_keyed_colour_is_white(tmp_path):
    pixels = picture()
    pixels[:, :9] = 10, 20, 30
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=(10, 20, 30))
    read = read_visual(tmp_path / "a.png", "image").pixels[0]
    assert (read[:, :9] == 255).all() and np.array_equal(read[:, 9:], pixels[:, 9:])


@pytest.mark.parametrize("transparent", [False, True])
def test_a_palette_image_keeps_its_colours(tmp_path, transparent):
    stored = Image.fromarray(picture()).quantize(16)
    stored.save(tmp_path / "a.png", **({"transparency": 0} if transparent else {}))
    expected = np.asarray(stored.convert("RGB")).copy()
    if transparent:
        expected[np.asarray(stored) == 0] = 255
    assert np.array_equal(read_visual(tmp_path / "a.png", "image").pixels[0], expected)


@pytest.mark.parametrize("mode", ["L", "1", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    stored = Image.fromarray(picture()).convert(mode)
    stored.save(tmp_path / "a.tiff")
    assert np.array_equal(read_visual(tmp_path / "a.tiff", "image").pixels[0], np.asarray(stored.convert("RGB")))


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".pgm"])
def test_16_bits_keep_their_high_byte(tmp_path, suffix):
    grey = np.linspace(0, 65535, 24 * 40).astype(np.uint16).reshape(24, 40)
    Image.fromarray(grey).save(tmp_path / f"a{suffix}")
    expected = (grey >> 8)[..., None].repeat(3, -1)
    assert np.array_equal(read_visual(tmp_path / f"a{suffix}", "image").pixels[0], expected)


def test_an_animation_gives_its_first_frame(tmp_path):
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert (read_visual(tmp_path / "a.gif", "image").pixels == (255, 0, 0)).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff"])
def test_an_image_cut_short(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(picture(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refusal(path, "image")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".mp4", ".mkv"])
def test_text_under_another_name(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text("not what the name says\n" * 99)
    refusal(path, "image")
    refusal(path, "video")


@pytest.mark.parametrize("kind", ["image", "video"])
def test_files_that_are_none(tmp_path, kind):
    (tmp_path / "empty").touch()
    assert "empty" in refusal(tmp_path / "empty", kind)
    assert "does not exist" in refusal(tmp_path / "nothing.png", kind)
    assert "not a file" in refusal(tmp_path, kind)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (15, 400), (20000, 10), (20, 4000)])
def test_sizes_that_show_nothing(tmp_path, width, height):
    Image.new("RGB", (width, height)).save(tmp_path / "a.png")
    assert f"{width}x{height}" in refusal(tmp_path / "a.png", "image")


def test_a_decompression_bomb(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    assert read_visual(tmp_path / "a.png", "image").pixels.shape == (1, 64, 64, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "too many pixels" in refusal(tmp_path / "a.png", "image")


def test_metadata_that_are_damaged_are_nothing_to_warn_of(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (64, 64)).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\0\0\0")
    with warnings.catch_warnings(action="error"):
        assert read_visual(path, "image").pixels.shape == (1, 64, 64, 3)
        with pytest.raises(LanceError, match="holds no request"):
            read_metadata(path)


def test_floating_point_pixels(tmp_path):
    Image.fromarray(np.ones((32, 32), np.float32)).save(tmp_path / "a.tiff")
    assert "floating-point" in refusal(tmp_path / "a.tiff", "image")


def test_a_video_is_no_image(tmp_path):
    refusal(write_video(tmp_path / "a.mp4", numbered(5)), "image")


@pytest.mark.parametrize(
    ("num_frames", "fps", "count"),
    # 12 a second: 13 frames; a multiple of four loses three; 6 seconds give 72, hence 69; then the whole length.
    [(26, 24, 13), (60, 30, 21), (24, 24, 9), (180, 30, 69), (3000, 30, 69), (50, 5, 69), (9, 5, 21), (1, 30, 1)],
)
def test_how_many_frames_stand_for_a_video(num_frames, fps, count):
    indices = sample_indices(num_frames, fps)
    assert len(indices) == count and indices[0] == 0
    assert count == 1 or indices[-1] == num_frames - 1


@given(st.integers(1, 20000), st.integers(1, 240))
def test_samples_are_4k_plus_1_frames_in_order(num_frames, fps):
    indices = sample_indices(num_frames, fps)
    assert len(indices) % 4 == 1 and len(indices) <= 69
    assert indices == sorted(indices) and 0 <= indices[0] and indices[-1] < num_frames
    steps = np.diff(indices)
    assert not len(steps) or steps.max() - steps.min() <= 1


@pytest.mark.parametrize(
    ("rate", "fps", "count"),
    [(30, 30, 40), (Fraction(24000, 1001), 24, 50), (Fraction(30000, 1001), 30, 40), (5, 5, 9)],
)
def test_frames_are_sampled_by_number(tmp_path, rate, fps, count):
    frames = read_visual(write_video(tmp_path / "a.mp4", numbered(count), rate), "video")
    assert frames.indices == tuple(sample_indices(count, fps))
    assert (frames.num_source_frames, frames.source_fps, frames.kind) == (count, fps, "video")
    assert np.abs(np.subtract(numbers(frames.pixels), frames.indices)).max() <= 1


def test_a_variable_frame_rate_is_sampled_by_number(tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(10, 90, 40)).tolist()
    frames = read_visual(write_video(tmp_path / "a.mp4", numbered(40), 1000, times), "video")
    assert frames.num_source_frames == 40 and frames.source_fps == round(40 / (times[-1] - times[0]) * 1000)
    assert np.abs(np.subtract(numbers(frames.pixels), frames.indices)).max() <= 1


@pytest.mark.parametrize("orientation", MATRICES)
def test_the_display_matrix_is_applied(tmp_path, orientation):
    path = write_video(tmp_path / "a.mp4", [quadrants()] * 9)
    set_display_matrix(path, *MATRICES[orientation])
    pixels = read_visual(path, "video").pixels
    expected = UPRIGHT[orientation](quadrants())
    assert pixels.shape[1:] == expected.shape
    assert np.abs(pixels[0].astype(int) - expected).mean() < 4


def test_a_video_of_one_frame(tmp_path):
    frames = read_visual(write_video(tmp_path / "a.mp4", [quadrants()]), "video")
    assert frames.pixels.shape == (1, 32, 64, 3) and frames.indices == (0,)


@pytest.mark.parametrize("colorspace", [Colorspace.ITU601, Colorspace.ITU709])
def test_colours_follow_the_matrix_that_the_file_names(tmp_path, colorspace):
    path = write_video(tmp_path / "a.mp4", [quadrants()] * 5, colorspace=colorspace)
    assert np.abs(read_visual(path, "video").pixels[0].astype(int) - quadrants()).mean() < 4


def test_other_containers(tmp_path):
    frames = read_visual(write_video(tmp_path / "a.mkv", numbered(40)), "video")
    assert np.abs(np.subtract(numbers(frames.pixels), frames.indices)).max() <= 1


def test_sound_is_ignored_and_sound_alone_refused(tmp_path):
    for name, with_video in (("both.mp4", True), ("sound.m4a", False)):
        with av.open(str(tmp_path / name), "w", format="mp4") as container:
            sound = container.add_stream("aac", rate=44100)
            if with_video:
                stream = container.add_stream("libx264", rate=30)
                stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
                for pixels in numbered(20):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                container.mux(stream.encode(None))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.rate = 44100
            container.mux(sound.encode(samples))
            container.mux(sound.encode(None))
    assert read_visual(tmp_path / "both.mp4", "video").num_source_frames == 20
    assert "no video" in refusal(tmp_path / "sound.m4a", "video")


@pytest.mark.parametrize(("suffix", "reason"), [(".avi", "no frame"), (".mkv", "End of file"), (".mp4", "no video")])
def test_a_video_without_frames(tmp_path, suffix, reason):
    path = tmp_path / f"a{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        container.start_encoding()
    assert reason in refusal(path, "video")


def test_packets_that_give_no_frame_do_not_count(tmp_path):
    whole = write_video(tmp_path / "a.mp4", numbered(60), keyframes=20)
    with av.open(str(whole)) as source, av.open(str(tmp_path / "tail.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in list(source.demux(video=0))[5:-1]:  # 15 packets before the key frame that starts the rest
            packet.stream = stream
            target.mux(packet)
    frames = read_visual(tmp_path / "tail.mkv", "video")
    assert frames.num_source_frames == 40 and frames.indices == tuple(sample_indices(40, 30))
    assert np.abs(np.subtract(numbers(frames.pixels), np.add(frames.indices, 20))).max() <= 1


@pytest.mark.parametrize("faststart", [False, True])
@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_an_mp4_cut_short(tmp_path, faststart, kept):
    noise = np.random.default_rng(0).integers(0, 256, (30, 32, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mp4", noise, faststart=faststart)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert "cut short" in refusal(path, "video")


def test_an_mp4_that_ends_between_two_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered(30), faststart=True)
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: sorted(ends)[19]])
    assert "cut short by at least" in refusal(path, "video")


def test_an_unknown_codec(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered(5))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    assert "codec" in refusal(path, "video")


def test_a_narrow_video(tmp_path):
    assert "8x64" in refusal(write_video(tmp_path / "a.mp4", numbered(5, 64, 8)), "video")


def test_memory_does_not_grow_with_the_length(tmp_path):
    def peak(count: int) -> int:
        path = write_video(tmp_path / f"{count}.mp4", [quadrants(64, 64)] * count)
        tracemalloc.start()
        assert len(read_visual(path, "video").pixels) == 69
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(1200) < 1.2 * peak(200)


def test_heic_without_its_library_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "phone.HEIC"
    path.write_bytes(b"anything")
    with pytest.raises(LanceError, match=r"is HEIC, which needs pillow-heif: pip install '\.\[heif\]' in"):
        read_visual(path, "image")


def test_heic_is_read_and_upright(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    pixels = quadrants()
    heif.from_pillow(Image.fromarray(pixels)).save(str(tmp_path / "phone.heic"), quality=95)
    read = read_visual(tmp_path / "phone.heic", "image").pixels
    assert read.shape == (1, 32, 64, 3)
    assert np.abs(read[0].astype(int) - pixels).mean() < 5
