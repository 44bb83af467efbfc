"""Sizes of preprocessed visuals, without touching a pixel."""

import av
import numpy as np
import pytest
from PIL import Image

from reference.errors import ReferenceError
from reference.layout import VisualSize
from reference.media import MediaSize, bucket, read_size, resized, sampled_frames, visual_sizes
from reference.request import Medium, Request


def test_buckets_are_near_their_ratio_and_area():
    # Height, width for 21:9, 16:9, 4:3, 1:1, 3:4, 9:16 around 640 x 640 and 768 x 768 pixels.
    ratios = (21 / 9, 16 / 9, 4 / 3, 1, 3 / 4, 9 / 16)
    assert [bucket(ratio, 640) for ratio in ratios] == [
        (416, 976),
        (480, 848),
        (560, 752),
        (640, 640),
        (752, 560),
        (848, 480),
    ]
    assert bucket(4 / 3, 768) == (672, 896)


@pytest.mark.parametrize(
    ("size", "side", "unit", "expected"),
    [
        ((4000, 3000), 768, 16, (672, 896)),
        ((1920, 1080), 616, 28, (448, 812)),
        ((100, 100), 64, 28, (56, 56)),
        ((10, 20000), 64, 16, (80, 48)),
    ],
)
def test_the_nearest_bucket_is_cut_to_units(size, side, unit, expected):
    assert resized(MediaSize(*size), side, unit) == expected


@pytest.mark.parametrize(
    ("frames", "fps", "expected"),
    # 12 a second: 24 frames are a multiple of four and lose three; 6 seconds at most.
    [(60, 30, 21), (61, 30, 21), (63, 30, 25), (30, 30, 9), (1000, 25, 69), (2, 24, 1)],
)
def test_sampled_frames(frames, fps, expected):
    assert sampled_frames(MediaSize(1, 1, frames, fps)) == expected


def test_half_a_frame_cannot_be_sampled():
    with pytest.raises(ReferenceError, match="too short"):
        sampled_frames(MediaSize(1, 1, 1, 24))


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "a.png")
    with av.open(str(tmp_path / "b.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height = 64, 32
        for _ in range(45):
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 64, 3), np.uint8), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    (tmp_path / "c.png").write_text("nothing")
    return tmp_path


def test_files(folder):
    assert read_size(folder / "a.png", Medium.IMAGE) == MediaSize(40, 30)
    assert read_size(folder / "b.mp4", Medium.VIDEO) == MediaSize(64, 32, 45, 30)
    for name, medium in (
        ("c.png", Medium.IMAGE),
        ("c.png", Medium.VIDEO),
        ("d.png", Medium.IMAGE),
        ("d", Medium.VIDEO),
    ):
        with pytest.raises(ReferenceError, match="not readable|not found"):
            read_size(folder / name, medium)


def edit(**changes):
    spec = {
        "interleave_array": ["turn it", "a.png", "b.mp4"],
        "element_dtype_array": ["text", "image", "video"],
        "istarget_in_interleave": [0, 0, 0],
    }
    return Request.from_dict({"task": "video_edit", "spec": spec} | changes)


def test_visuals_of_a_request(folder):
    image, video = visual_sizes(edit(resolution="image_512res"), folder)
    assert image == VisualSize((1, 448, 592), (1, 26, 36))
    # 45 frames of 30 a second: 18 wanted, 17 taken, an eighteenth shown to the ViT.
    assert video == VisualSize((17, 384, 688), (9, 24, 42))
    assert visual_sizes(edit(vae_resolution=64, vit_resolution=56), folder)[0].vae == (1, 48, 64)


def test_a_resolution_must_be_known(folder):
    for changes in ({}, {"resolution": "video_8k"}, {"vae_resolution": 64}):
        with pytest.raises(ReferenceError, match="resolution"):
            visual_sizes(edit(**changes), folder)
