"""PNG and MP4 output: exact pixels, whole files only, metadata that reads back."""

import json

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from lance_mlx.errors import LanceError
from lance_mlx.media.write import VideoWriter, check_output, read_metadata, save_image, to_uint8

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
    with VideoWriter(path, 12, REQUEST) as writer:
        for frame in frames:
            writer.write(frame)
            assert not path.exists()
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


def test_long_prompts_fit_into_both_kinds_of_metadata(tmp_path):
    request = {"prompt": "lantern " * 6000}
    save_image(tmp_path / "out.png", gradient(16, 16), request)
    with VideoWriter(tmp_path / "out.mp4", 23.976, request) as writer:
        writer.write(gradient(16, 16))
    assert read_metadata(tmp_path / "out.png") == read_metadata(tmp_path / "out.mp4") == request


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_video_leaves_nothing_new(tmp_path, error):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"an earlier video")
    with pytest.raises(error), VideoWriter(path, 12, {}) as writer:
        writer.write(gradient(16, 16))
        raise error
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
    with pytest.raises(LanceError, match=message), VideoWriter(tmp_path / "out.mp4", 12, {}) as writer:
        for frame in frames:
            writer.write(frame)
    assert list(tmp_path.iterdir()) == []


def test_a_frame_rate_of_zero_is_an_error(tmp_path):
    with pytest.raises(LanceError, match="fps must be positive, not 0"):
        VideoWriter(tmp_path / "out.mp4", 0, {})


def test_failed_writes_name_the_output(tmp_path):
    path = tmp_path / "gone" / "out"
    with pytest.raises(LanceError, match=r"cannot write .*out\.png: No such file"):
        save_image(path.with_suffix(".png"), gradient(16, 16), {})
    with pytest.raises(LanceError, match=r"cannot write .*out\.mp4: No such file"):
        with VideoWriter(path.with_suffix(".mp4"), 12, {}) as writer:
            writer.write(gradient(16, 16))


@pytest.mark.parametrize(
    ("name", "num_frames", "message"),
    [
        ("out.gif", 1, "unknown suffix '.gif'"),
        ("out", 1, "unknown suffix ''"),
        ("out.png", 50, "holds one frame, not 50; use .mp4"),
        ("out.mp4", 1, "one frame is an image; use .png"),
        ("missing/out.png", 1, "missing does not exist; make it first"),
        ("folder.png", 1, "is a folder"),
    ],
)
def test_unusable_outputs_are_found_before_the_work(tmp_path, name, num_frames, message):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(LanceError, match=message):
        check_output(tmp_path / name, num_frames)


def test_a_folder_without_write_permission_is_found_before_the_work(tmp_path, monkeypatch):
    # The permission bits do not bind the superuser, so the answer itself is replaced.
    monkeypatch.setattr("lance_mlx.media.write.os.access", lambda path, mode: False)
    with pytest.raises(LanceError, match="cannot be written to"):
        check_output(tmp_path / "out.png", 1)


def test_usable_outputs_are_returned(tmp_path):
    assert check_output(tmp_path / "out.PNG", 1) == tmp_path / "out.PNG"
    assert check_output(str(tmp_path / "out.mp4"), 2) == tmp_path / "out.mp4"


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


@pytest.mark.parametrize("name", ["out.png", "out.mp4"])
def test_unreadable_files_are_named(tmp_path, name):
    with pytest.raises(LanceError, match=f"cannot read .*{name}"):
        read_metadata(tmp_path / name)
    (tmp_path / name).write_bytes(b"neither")
    with pytest.raises(LanceError, match=f"cannot read .*{name}"):
        read_metadata(tmp_path / name)
