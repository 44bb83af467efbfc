"""Parts of the server that need no server."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("gradio", reason="the server needs its extra: pip install '.[serve,test]'")

from pathlib import Path  # noqa: E402 - only where there is a server

from lance_mlx import Request, Task  # noqa: E402
from lance_mlx.media.preprocess import RESOLUTIONS  # noqa: E402
from lance_mlx.media.read import reads_heic  # noqa: E402
from lance_mlx.serve.bodies import ChatBody, ImageBody, parse  # noqa: E402
from lance_mlx.serve.errors import ApiError  # noqa: E402
from lance_mlx.serve.sizes import ASPECTS, size_of  # noqa: E402
from lance_mlx.serve.uploads import check, from_data_url, from_file  # noqa: E402
from lance_mlx.serve.worker import previewed_steps  # noqa: E402

MESSAGES = {"messages": [{"role": "user", "content": "what"}]}


def test_openais_parameters_are_taken_where_they_do_nothing():
    chat = {"presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False, "response_format": {"type": "text"}}
    assert parse(ChatBody, MESSAGES | chat) == parse(ChatBody, MESSAGES)
    assert parse(ImageBody, {"prompt": "a", "style": "vivid"}) == parse(ImageBody, {"prompt": "a"})


def test_a_negative_prompt_reaches_the_request():
    body = parse(ImageBody, {"prompt": "a bird", "negative_prompt": "a cat"})
    assert [request.negative_prompt for request in body.requests(Task.T2I)] == ["a cat"]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("presence_penalty", 0.5, "presence_penalty can only be 0 here: leave it out"),
        ("logprobs", True, "logprobs can only be false here: leave it out"),
        ("tools", [{"type": "function"}], "tools can only be \\[\\] here: leave it out"),
        ("verbosity", "high", "unknown parameter 'verbosity'"),
    ],
)
def test_openais_parameters_are_refused_where_they_would_do_something(name, value, told):
    with pytest.raises(ApiError, match=told) as refused:
        parse(ChatBody, MESSAGES | {name: value})
    assert refused.value.param == name


def test_sizes_are_those_of_upstreams_demo():
    sizes = {aspect: size_of(aspect, 640) for aspect in ASPECTS}
    assert sizes == {
        "21:9": (976, 416),
        "16:9": (848, 480),
        "3:2": (784, 528),
        "4:3": (736, 560),
        "1:1": (640, 640),
        "3:4": (560, 736),
        "2:3": (528, 784),
        "9:16": (480, 848),
    }
    # Where upstream's would be wider than the position table.
    assert size_of("21:9", 768) == (1024, 432)


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("resolution", sorted({vae for vae, _ in RESOLUTIONS.values()}))
def test_every_size_that_is_offered_can_be_drawn(aspect, resolution):
    width, height = size_of(aspect, resolution)
    assert Request(Task.T2I, "a bird", height, width)


@given(st.integers(1, 200), st.integers(0, 4))
def test_previews_come_at_steps_between_the_first_and_the_last(num_steps, previews):
    steps = previewed_steps(num_steps, previews)
    assert len(steps) <= previews and all(0 < step < num_steps for step in steps)
    assert len(steps) == previews or num_steps <= previews


@given(content=st.binary(max_size=300), name=st.text(max_size=80))
def test_whatever_is_uploaded_stays_in_its_folder(tmp_path_factory, content, name):
    from lance_mlx.serve.errors import ApiError

    folder = tmp_path_factory.mktemp("uploads", numbered=True)
    with pytest.raises(ApiError) as refused:
        from_file(io.BytesIO(content), name, folder)
    assert "\n" not in str(refused.value) and str(folder) not in str(refused.value)
    (kept,) = folder.iterdir()
    assert kept.is_file()


def test_a_file_is_read_whole_and_named_after_what_it_holds(tmp_path, picture, clip, data_url):
    image = from_data_url(data_url(picture), tmp_path)
    assert Path(image.path).read_bytes() == picture and image.path.endswith("0-upload.png")
    with clip.open("rb") as file:
        video = from_file(file, "../a clip.m3u8", tmp_path)
    assert Path(video.path).name == "1-a-clip.mp4" and video.kind == "video"
    assert np.array_equal(np.frombuffer(Path(video.path).read_bytes(), np.uint8), np.fromfile(clip, np.uint8))
    for form in ("AVIF", "HEIF"):
        if form == "AVIF" or reads_heic():
            Image.open(io.BytesIO(picture)).save(tmp_path / form, form)
            shown = from_data_url(data_url((tmp_path / form).read_bytes()), tmp_path)
            assert (shown.kind, Path(shown.path).suffix) == ("image", f".{form.lower()}")
    (tmp_path / "x").write_bytes(picture)
    assert check(tmp_path / "x", "x").kind == "image"


def test_a_video_is_bound_as_large_as_it_is_shown(wide_video):
    with pytest.raises(ApiError, match="wide.mp4, 4096x512, has too many pixels"):
        check(wide_video(256, 512, aspect=16), "wide.mp4")
