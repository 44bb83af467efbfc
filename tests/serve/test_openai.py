"""OpenAI's own client against every endpoint, on the small checkpoint."""

import base64
import io
import json
import time
import urllib.request

import av
import numpy as np
import pytest
from PIL import Image

from lance_mlx import Variant
from lance_mlx.model.vae import VAE

pytest.importorskip("gradio", reason="the server needs its extra: pip install '.[serve,test]'")
openai = pytest.importorskip("openai", reason="the client of the API: pip install '.[test]'")
# OpenAI's own videos were taken out of service; its client speaks of them still.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
FAST = {"num_steps": 2}
SMALL = FAST | {"resolution": "image_256res"}


def image_of(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def request_in(image: Image.Image) -> dict:
    return json.loads(image.text["lance-mlx"])["request"]


def asking(url: str, question: str = "what is it", kind: str = "image_url") -> list[dict]:
    return [{"role": "user", "content": [{"type": kind, kind: {"url": url}}, {"type": "text", "text": question}]}]


def finished(client, video):
    end = time.monotonic() + 120
    while video.status in ("queued", "in_progress"):
        assert time.monotonic() < end
        time.sleep(0.1)
        video = client.videos.retrieve(video.id)
    return video


def test_models_and_health(server):
    assert [model.id for model in server.client().models.list()] == ["lance"]
    assert server.client().models.retrieve("lance").id == "lance"
    health = json.load(urllib.request.urlopen(f"{server.address}/health"))
    assert health == {"status": "ok", "waiting": 0, "working": False}


def test_images_are_drawn_side_by_side_with_seeds_that_follow_each_other(server, monkeypatch):
    drawn, draw = [], server.worker.model.generate_batch
    monkeypatch.setattr(
        server.worker.model,
        "generate_batch",
        lambda requests, *given: drawn.append(len(requests)) or draw(requests, *given),
    )
    made = server.client().images.generate(prompt="a bird", size="64x48", n=2, extra_body=FAST | {"seed": 7})
    images = [image_of(item.b64_json) for item in made.data]
    assert [image.size for image in images] == [(64, 48)] * 2 and made.size == "64x48"
    assert [request_in(image)["seed"] for image in images] == [7, 8] == [item.seed for item in made.data]
    again = server.client().images.generate(prompt="a bird", size="64x48", extra_body=FAST | {"seed": 8})
    # But for the order of sums.
    assert np.abs(np.asarray(image_of(again.data[0].b64_json)).astype(int) - np.asarray(images[1])).max() <= 1
    assert drawn == [2, 1]
    server.settle()


def test_an_image_is_streamed_with_previews(server, monkeypatch):
    client = server.client()
    client.images.generate(prompt="a bird", size="64x48", extra_body=FAST)
    pipeline, decoded = server.worker.model.pipeline(Variant.IMAGE, looks=False), []
    pipeline.preview_weights = np.ones((49, 3), np.float32)
    monkeypatch.setattr(
        type(pipeline.vae), "decode", lambda vae, latents, of=VAE.decode: decoded.append(1) or of(vae, latents)
    )
    events = list(
        client.images.generate(
            prompt="a bird", size="64x48", stream=True, partial_images=2, extra_body={"num_steps": 6}
        )
    )
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    # One that comes before the one ahead of it was read takes its place.
    assert kinds in ([*["partial_image"] * count, "completed"] for count in range(3))
    assert all(image_of(event.b64_json).size == (64, 48) for event in events)
    # By the map alone, whose three colours are one here.
    assert decoded == [1]
    assert all(np.ptp(np.asarray(image_of(event.b64_json)), axis=-1).max() == 0 for event in events[:-1])
    del pipeline.preview_weights
    server.settle()


def test_images_are_edited(server, picture):
    client = server.client()
    made = client.images.edit(image=("cat.png", picture), prompt="make it blue", extra_body=SMALL)
    image = image_of(made.data[0].b64_json)
    written = request_in(image)
    assert written["task"] == "image_edit" and image.size == (304, 224)
    # Where the server keeps its files is nobody's business.
    assert written["visuals"] == [{"path": "0-cat.png", "kind": "image"}]
    made = client.images.edit(
        image=[picture, picture], prompt="both", size="64x48", extra_body=SMALL | {"task": "subject"}
    )
    assert request_in(image_of(made.data[0].b64_json))["task"] == "subject"
    events = list(client.images.edit(image=picture, prompt="redder", stream=True, extra_body=SMALL))
    assert events[-1].type == "image_edit.completed"
    server.settle()


def test_a_video_is_queued_asked_after_fetched_and_deleted(server):
    client = server.client()
    video = client.videos.create(prompt="a bird", size="64x48", seconds="1", extra_body=FAST)
    assert (video.status, video.size) == ("queued", "64x48") or video.status == "in_progress"
    with pytest.raises(openai.ConflictError, match="not finished"):
        client.videos.download_content(video.id)
    video = finished(client, video)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    content = client.videos.download_content(video.id).read()
    with av.open(io.BytesIO(content)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 13
    assert [listed.id for listed in client.videos.list()] == [video.id]
    assert client.videos.delete(video.id).deleted
    for gone in (client.videos.retrieve, client.videos.download_content, client.videos.delete):
        with pytest.raises(openai.NotFoundError):
            gone(video.id)
    server.settle()


def test_an_image_is_animated_and_a_video_edited(server, picture, clip, data_url):
    client, given = server.client(), FAST | {"resolution": "video_192p"}
    moving = client.videos.create(
        prompt="it moves", input_reference=("a.png", picture), extra_body=given | {"num_frames": 5}
    )
    edited = client.videos.edit(prompt="redder", video=clip, extra_body=given)
    done = [finished(client, video) for video in (moving, edited)]
    assert [(video.status, video.size) for video in done] == [("completed", "304x224")] * 2
    image = {"prompt": "x", "input_reference": {"image_url": data_url(picture)}, "num_frames": 5}
    for path, body in (("/videos", image), ("/videos/edits", {"prompt": "x", "video": {"id": moving.id}})):
        assert client.post(path, cast_to=dict, body=body | given)["status"] in ("queued", "in_progress")
    for video in client.videos.list():
        client.videos.delete(video.id)
    server.settle()


def test_a_video_that_is_deleted_is_not_made(server):
    client = server.client()
    video = client.videos.create(prompt="a bird", size="96x96", seconds="1", extra_body={"num_steps": 200})
    client.videos.delete(video.id)
    server.settle()


def test_questions_about_an_image_and_about_a_video(server, picture, clip, data_url):
    client, options = server.client(), {"model": "lance", "max_tokens": 6}
    image = asking(data_url(picture))
    answered = client.chat.completions.create(messages=image, **options, extra_body={"resolution": "image_256res"})
    choice = answered.choices[0]
    assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
    chunks = list(
        client.chat.completions.create(
            messages=image, stream=True, **options, extra_body={"resolution": "image_256res"}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason
    small = {"resolution": "video_192p"}
    video = asking(data_url(clip.read_bytes(), "video/mp4"), kind="video_url")
    assert client.chat.completions.create(messages=video, **options, extra_body=small).choices[0].message
    part = {"type": "file", "file": {"file_data": data_url(clip.read_bytes(), "video/mp4"), "filename": "a.mp4"}}
    described = [{"role": "system", "content": "Describe."}, {"role": "user", "content": [part]}]
    assert client.chat.completions.create(messages=described, **options, extra_body=small).choices[0].message
    server.settle()


@pytest.mark.parametrize(
    ("values", "kind", "told"),
    [
        ({"size": "100x100"}, "BadRequestError", "height 100 must be a multiple of 16"),
        ({"size": "large"}, "BadRequestError", "WIDTHxHEIGHT"),
        ({"n": 99}, "BadRequestError", "n: Input should be less than"),
        ({"n": "many"}, "BadRequestError", "n: Input should be a valid integer"),
        ({"model": "dall-e-3"}, "NotFoundError", "there is no model 'dall-e-3'"),
        ({"extra_body": {"stepz": 3}}, "BadRequestError", "unknown parameter 'stepz'"),
        ({"extra_body": {"num_steps": 10**6}}, "BadRequestError", "num_steps"),
        ({"extra_body": {"guidance_scale": "NaN"}}, "BadRequestError", "guidance_scale nan must be a finite number"),
        ({"prompt": "<|video_pad|>"}, "BadRequestError", "control token"),
        ({"prompt": "x" * 40000}, "BadRequestError", "prompt"),
        ({"response_format": "url"}, "BadRequestError", "response_format"),
    ],
)
def test_a_wrong_image_request_is_refused_as_openai_refuses_it(server, values, kind, told):
    with pytest.raises(getattr(openai, kind), match=told) as refused:
        server.client().images.generate(**({"prompt": "a bird"} | values))
    assert refused.value.type in ("invalid_request_error", "not_found_error")
    assert server.jobs() == []


def test_wrong_conversations_are_refused(server, picture, clip, data_url):
    image = asking(data_url(picture))
    both = image + asking(data_url(clip.read_bytes(), "video/mp4"), kind="video_url")
    wrong = {
        "no image or video": [{"role": "user", "content": "hello"}],
        "both images and videos": both,
        "no message of the user": [{"role": "system", "content": "x"}],
        "the role of a message": [{"role": "tool", "content": "x"}],
        "URLs and paths are not read": asking("https://example.com/cat.png"),
        "in base64": asking("data:image/png,abc"),
        "valid base64": asking("data:image/png;base64,%%%"),
        "is no image": asking(data_url(clip.read_bytes())),
        "is no video": asking(data_url(picture), kind="video_url"),
        "is empty": asking("data:image/png;base64,"),
        "a part must be of type": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        "content must be": [{"role": "user", "content": 3}],
        "at most 8": [{"role": "user", "content": image[0]["content"] * 9}],
    }
    for told, messages in wrong.items():
        with pytest.raises(openai.BadRequestError, match=told):
            server.client().chat.completions.create(model="lance", messages=messages)
    with pytest.raises(openai.NotFoundError, match="there is no /v1/embeddings"):
        server.client().embeddings.create(model="lance", input="x")
    with pytest.raises(openai.BadRequestError, match="knows no masks"):
        server.client().images.edit(image=picture, mask=picture, prompt="x")
    with pytest.raises(openai.BadRequestError, match="leave out size"):
        server.client().images.edit(image=picture, prompt="x", size="1024x1024")
    assert server.jobs() == []
