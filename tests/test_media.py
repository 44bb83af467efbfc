"""PNG and MP4 output: exact pixels, whole files only, metadata that reads back."""

import base64
import errno
import fcntl
import json
import os
import unicodedata
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from lance_mlx.errors import LanceError
from lance_mlx.files import check_place, taken_for_one
from lance_mlx.media.write import (
    check_output,
    check_text_output,
    read_metadata,
    save_image,
    save_text,
    save_video,
    to_uint8,
)

REQUEST = {
    "task": "t2v",
    "prompt": 'a "small" café = nice; # 雪\n第二行 \\ \U0001f426',
    "seed": 42,
    "cfg_interval": [0.4, 1.0],
    "cfg_renorm_type": None,
}


def gradient(height: int, width: int, offset: int = 0) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 2 + offset, y * 3, np.full_like(x, 90)], axis=-1).astype(np.uint8)


def decode(path) -> list[np.ndarray]:
    """RGB frames, float [H, W, 3], by the BT.601 formula (limited range); FFmpeg's own conversion truncates."""
    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            planes = frame.to_ndarray(format="yuv420p").astype(float)
            height, width = frame.height, frame.width
            y = (planes[:height] - 16) * 255 / 219
            u, v = ((planes[height:].reshape(2, height // 2, width // 2) - 128) * 255 / 224).repeat(2, 1).repeat(2, 2)
            frames.append(np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], axis=-1))
    return frames


def test_pixels_are_rounded_not_truncated():
    # 100.6 / 255 and 100.4 / 255 on the [-1, 1] scale.
    pixels = np.array([-1, 1, 0, -3, 7, 100.6 / 255 * 2 - 1, 100.4 / 255 * 2 - 1], dtype=np.float32)
    assert to_uint8(pixels).tolist() == [0, 255, 128, 0, 255, 101, 100]


@given(st.integers(0, 255))
def test_every_8_bit_value_survives(value):
    assert to_uint8(np.array(value / 255 * 2 - 1)) == value


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_pixels_that_are_no_numbers_are_an_error(bad):
    with pytest.raises(LanceError, match="NaN or infinite"):
        to_uint8(np.array([0.0, bad]))


def test_image_and_request_read_back_exactly(tmp_path):
    path = tmp_path / "out.png"
    frame = gradient(48, 64)
    save_image(path, frame, REQUEST)
    assert np.array_equal(np.asarray(Image.open(path)), frame)
    assert read_metadata(path) == REQUEST
    assert json.loads(Image.open(path).text["lance-mlx"]) == REQUEST
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.png"]


def test_image_replaces_an_earlier_one(tmp_path):
    path = tmp_path / "out.png"
    path.write_bytes(b"old")
    save_image(path, gradient(16, 16), {})
    assert read_metadata(path) == {}


def test_video_reads_back(tmp_path):
    path = tmp_path / "out.mp4"
    frames = [gradient(48, 64, offset=5 * i) for i in range(9)]
    save_video(path, (frame for frame in frames if not path.exists()), 12, REQUEST)
    decoded = decode(path)
    assert len(decoded) == 9
    # Lossy, and colour is stored for 2x2 pixels: close, in the right order and not shifted in brightness.
    for frame, out in zip(frames, decoded, strict=True):
        assert np.abs(out - frame).mean() < 3
        # The encoder moves the mean by up to 0.5, a wrong range of values by 4 and more.
        assert abs(out.mean() - frame.mean()) < 2
    assert read_metadata(path) == REQUEST
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 12)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.mp4"]


TILE = 32


def written_tiles(path) -> np.ndarray:
    """Write nine values of red, green and blue each, as tiles; returns the colours, [27, 27, 3]."""
    values = np.linspace(0, 255, 9).round()
    colours = np.stack(np.meshgrid(values, values, values), -1).reshape(27, 27, 3)
    save_video(path, [colours.astype(np.uint8).repeat(TILE, 0).repeat(TILE, 1)] * 3, 12, REQUEST)
    return colours


def middles(frame: np.ndarray) -> np.ndarray:
    return frame[TILE // 2 :: TILE, TILE // 2 :: TILE]


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_a_video_says_its_colours_and_keeps_them(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    colours = written_tiles(path)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        said = context.color_primaries, context.color_trc, context.colorspace, context.color_range
        frames = list(container.decode(video=0))
    # Primaries of BT.709, sRGB, matrix of BT.601, limited, in the numbers of ITU-T H.273; the container says so too.
    assert said == (1, 13, 6, 1)
    assert (b"colrnc" + (b"lx" if suffix == ".mp4" else b"lc") + bytes([0, 1, 0, 13, 0, 6])) in path.read_bytes()
    for frame, exact in zip(frames, decode(path), strict=True):
        errors = middles(exact) - colours
        assert np.abs(errors.round()).max() <= 2 and np.abs(errors.mean((0, 1))).max() < 0.1
        # FFmpeg's SWS_ACCURATE_RND and SWS_FULL_CHR_H_INT, for which av 17 has no names; else it cuts off, not rounds.
        for flags, most in ((0x42000, 2), (0, 3)):
            shown = frame.reformat(format="rgb24", interpolation=2 | flags).to_ndarray()
            assert np.abs(middles(shown) - colours).max() <= most


_PLAY = """
const [url, tile, done] = arguments, video = document.createElement('video');
if (!video.canPlayType('video/mp4; codecs="avc1.64001f"')) return done(null);
video.onerror = () => done(`error ${video.error.message}`);
video.requestVideoFrameCallback(() => {
    const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight), drawing = canvas.getContext('2d');
    drawing.drawImage(video, 0, 0);
    const shown = [];
    for (let y = tile / 2; y < canvas.height; y += tile)
        for (let x = tile / 2; x < canvas.width; x += tile) shown.push(...drawing.getImageData(x, y, 1, 1).data);
    done(shown);
});
document.body.append(video);
video.muted = true;
video.src = url;
video.play();
"""


def test_a_browser_shows_the_colours_of_a_video(browser, tmp_path):
    colours = written_tiles(tmp_path / "out.mp4")
    browser.get("about:blank")
    url = f"data:video/mp4;base64,{base64.b64encode((tmp_path / 'out.mp4').read_bytes()).decode()}"
    shown = browser.execute_async_script(_PLAY, url, TILE)
    if shown is None:
        pytest.skip("this Chromium plays no H.264")
    assert np.abs(np.array(shown, float).reshape(27, 27, 4)[..., :3] - colours).max() <= 2


def test_long_prompts_fit_into_both_kinds_of_metadata(tmp_path):
    request = {"prompt": "lantern " * 6000}
    save_image(tmp_path / "out.png", gradient(16, 16), request)
    save_video(tmp_path / "out.mp4", [gradient(16, 16)], 23.976, request)
    assert read_metadata(tmp_path / "out.png") == read_metadata(tmp_path / "out.mp4") == request


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_video_leaves_nothing_new(tmp_path, error):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"an earlier video")

    def frames():
        yield gradient(16, 16)
        raise error

    with pytest.raises(error):
        save_video(path, frames(), 12, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.mp4"]
    assert path.read_bytes() == b"an earlier video"


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([gradient(16, 17)], "even width and height, not 17x16"),
        ([gradient(16, 16), gradient(32, 16)], "got 16x32 after 16x16"),
        ([gradient(16, 16).astype(np.float32)], r"not float32 \[16, 16, 3\]"),
        ([gradient(16, 16)[..., :1]], r"not uint8 \[16, 16, 1\]"),
        ([], "no frame was written"),
    ],
)
def test_bad_frames_are_an_error_and_leave_nothing(tmp_path, frames, message):
    with pytest.raises(LanceError, match=message):
        save_video(tmp_path / "out.mp4", frames, 12, {})
    assert list(tmp_path.iterdir()) == []


def test_a_frame_rate_of_zero_is_an_error(tmp_path):
    with pytest.raises(LanceError, match="fps must be positive, not 0"):
        save_video(tmp_path / "out.mp4", [gradient(16, 16)], 0, {})


def test_failed_writes_name_the_output(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "out"
    with pytest.raises(LanceError, match=r"cannot write .*out\.png: File exists"):
        save_image(path.with_suffix(".png"), gradient(16, 16), {})
    with pytest.raises(LanceError, match=r"cannot write .*out\.mp4: File exists"):
        save_video(path.with_suffix(".mp4"), [gradient(16, 16)], 12, {})


@pytest.mark.parametrize(
    ("name", "num_frames", "message"),
    [
        ("out.bmp", 1, "unknown suffix '.bmp'"),
        ("out", 1, "unknown suffix ''"),
        ("out.png", 50, "holds one frame, not 50; use .mp4"),
        ("out.webp", 2, "holds one frame, not 2; use .mp4"),
        ("out.mp4", 1, "one frame is an image; use .png"),
        ("out.gif", 1, "one frame is an image; use .png"),
        ("folder.png/out.png/out.png", 1, "folder.png/out.png is not a folder"),
        ("folder.png", 1, "is a folder"),
        ("o" * 252 + ".png", 1, "File name too long"),
        ("missing/" + "雪" * 90 + ".png", 1, "File name too long"),
    ],
)
def test_unusable_outputs_are_found_before_the_work(tmp_path, name, num_frames, message):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "out.png").touch()
    with pytest.raises(LanceError, match=message):
        check_output(tmp_path / name, num_frames)


def test_a_folder_without_write_permission_is_found_before_the_work(tmp_path, monkeypatch):
    # The permission bits do not bind the superuser, so the answer itself is replaced.
    monkeypatch.setattr("lance_mlx.files.os.access", lambda path, mode: False)
    with pytest.raises(LanceError, match="cannot be written to"):
        check_output(tmp_path / "out.png", 1)


def test_links_are_followed_and_pipes_written_to(tmp_path):
    (tmp_path / "there").mkdir()
    link, pipe = tmp_path / "link.png", tmp_path / "pipe.png"
    link.symlink_to("there/real.png")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (link, pipe):
        save_image(check_output(path, 1, overwrite=False), gradient(16, 16), {"a": 1})
    assert os.read(reader, 10_000) == (tmp_path / "there" / "real.png").read_bytes()
    assert link.is_symlink() and pipe.is_fifo() and read_metadata(link) == {"a": 1}
    with pytest.raises(LanceError, match="link.png is there already"):
        check_output(link, 1, overwrite=False)
    os.close(reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.png", "pipe.png", "there"]


def test_a_full_device_is_one_line(tmp_path):
    (tmp_path / "full.txt").symlink_to("/dev/full")
    with pytest.raises(LanceError, match="cannot write .*full.txt: No space left on device"):
        save_text(check_text_output(tmp_path / "full.txt"), "text")


def test_usable_outputs_are_returned(tmp_path):
    assert check_output(tmp_path / "out.PNG", 1) == tmp_path / "out.PNG"
    assert check_output(str(tmp_path / "out.mp4"), 2) == tmp_path / "out.mp4"
    assert check_output(tmp_path / "new" / "folder" / "out.gif", 2) == tmp_path / "new" / "folder" / "out.gif"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_kept_unless_it_may_go(tmp_path):
    path = tmp_path / "out.png"
    path.touch()
    assert check_output(path, 1) == path
    for check in (lambda: check_output(path, 1, overwrite=False), lambda: check_place(path, overwrite=False)):
        with pytest.raises(LanceError, match="is there already; choose another name, or give --overwrite"):
            check()


def test_a_name_that_the_disk_does_not_take_is_found_before_the_work(tmp_path, monkeypatch):
    names = ["a:b.png", "new/what?/a.png", "end. /a.png", "tab\t.png"]
    for name in names:
        assert check_output(tmp_path / name, 1) == tmp_path / name
    touch = Path.touch

    def of_windows(path: Path, mode: int = 0o666, exist_ok: bool = True) -> None:
        if set(':?\t"') & set(str(path)) or "end. /" in str(path):
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        touch(path, mode, exist_ok)

    monkeypatch.setattr(Path, "touch", of_windows)
    for name in names:
        with pytest.raises(LanceError, match=r"cannot be written \(Invalid argument\); choose another name"):
            check_output(tmp_path / name, 1)
    assert check_output(tmp_path / "a b.png", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", [True, False])
def test_names_that_the_disk_does_not_tell_apart_are_found(tmp_path, monkeypatch, there):
    folder = tmp_path if there else tmp_path / "new" / "folder"
    names = ["a/Bird.png", "b/bird.png", "a/cat.png", "a/bird.png", "caf\u00e9.png", "a:b.png", "A:b.png"]
    assert taken_for_one(folder, [*names, "cafe\u0301.png"]) is None
    touch = Path.touch
    monkeypatch.setattr(Path, "touch", lambda path, exist_ok: touch(folded(path), exist_ok=exist_ok))

    def folded(path: Path) -> Path:
        if ":" in path.name:
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return path.with_name(unicodedata.normalize("NFD", path.name).casefold())

    assert taken_for_one(folder, names) == ("a/Bird.png", "a/bird.png")
    assert taken_for_one(folder, names[:3]) is None
    assert taken_for_one(folder, ["cafe\u0301.png", *names[:3], names[4]]) == ("cafe\u0301.png", "caf\u00e9.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp", ".JPG"])
def test_every_form_of_an_image_reads_back(tmp_path, suffix):
    path, frame = tmp_path / f"out{suffix}", gradient(48, 64)
    save_image(path, frame, REQUEST)
    assert read_metadata(path) == REQUEST
    assert np.abs(np.asarray(Image.open(path)).astype(int) - frame).max() <= (0 if suffix == ".webp" else 8)


def test_a_jpeg_without_room_for_the_request_is_found_before_the_work(tmp_path):
    long = {"prompt": "雪" * 20_000}
    with pytest.raises(LanceError, match="no room for so long a request; use .png or .webp"):
        check_output(tmp_path / "out.jpg", 1, metadata=long)
    save_image(tmp_path / "out.webp", gradient(16, 16), long)
    assert read_metadata(tmp_path / "out.webp") == long
    save_image(tmp_path / "out.jpg", gradient(16, 16), {"prompt": "a" * 63_900})


def test_a_mov_and_a_gif_have_their_frames_and_their_rate(tmp_path):
    frames = [gradient(48, 64, offset=5 * i) for i in range(9)]
    for name in ("out.mov", "out.gif"):
        save_video(tmp_path / name, iter(frames), 12, REQUEST)
        assert read_metadata(tmp_path / name) == REQUEST
    with av.open(str(tmp_path / "out.mov")) as container:
        assert container.streams.video[0].average_rate == 12
        assert sum(1 for _ in container.decode(video=0)) == 9
    with Image.open(tmp_path / "out.gif") as image:
        durations = []
        for index, frame in enumerate(frames):
            image.seek(index)
            durations.append(image.info["duration"])
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - frame).mean() < 4
    assert sum(durations) == 750 and set(durations) == {80, 90}


def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path):
    path = check_output(tmp_path / ("o" * 251 + ".png"), 1)
    save_image(path, gradient(16, 16), {})
    assert path.is_file()


def test_what_a_killed_process_left_goes_and_what_a_live_one_writes_stays(tmp_path):
    left, live = tmp_path / ".lance-mlx-00000000.part", tmp_path / ".lance-mlx-11111111.part"
    for part in (left, live):
        part.write_bytes(b"half")
        os.utime(part, (0, 0))
    with live.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        save_image(tmp_path / "out.png", gradient(16, 16), {})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [live.name, "out.png"]


def write_foreign(path, comment):
    with av.open(str(path), "w", format="mp4") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=12)
        stream.width = stream.height = 16
        container.mux(stream.encode(av.VideoFrame.from_ndarray(gradient(16, 16), format="rgb24")))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("comment", ["made by hand", "[1]", '{"prompt": "x"}'])
def test_files_of_other_programs_hold_no_request(tmp_path, comment):
    write_foreign(tmp_path / "out.mp4", comment)
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", comment)
    Image.fromarray(gradient(16, 16)).save(tmp_path / "out.png", pnginfo=info)
    for name in ("out.mp4", "out.png"):
        with pytest.raises(LanceError, match="holds no request written by lance-mlx"):
            read_metadata(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "told"), [("out.png", "out.png holds no request"), ("out.mp4", "cannot read .*out.mp4")]
)
def test_unreadable_files_are_named(tmp_path, name, told):
    with pytest.raises(LanceError, match=f"cannot read .*{name}"):
        read_metadata(tmp_path / name)
    (tmp_path / name).write_bytes(b"neither")
    with pytest.raises(LanceError, match=told):
        read_metadata(tmp_path / name)
