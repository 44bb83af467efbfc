"""The Python interface: lazy loading, generating, turns, and answers."""

import base64
import io

import av
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import lance_mlx
import lance_mlx.loaded as loaded
from lance_mlx import FLOAT32, Entry, LanceError, LanceModel, Question, Request, Task, Variant, Visual, VisualKind, load
from lance_mlx.media.write import read_metadata
from lance_mlx.model.vit import VisionTransformer

SMALL = {"vae_resolution": 64, "vit_resolution": 56, "num_steps": 2}


@pytest.fixture(scope="module")
def model(checkpoint) -> LanceModel:
    """The small checkpoint in float32."""
    return load(checkpoint, FLOAT32)


@pytest.fixture
def image(media) -> Visual:
    """A transparent PNG."""
    return Visual(str(media / "logo.png"), VisualKind.IMAGE)


@pytest.fixture
def looks(monkeypatch) -> list[int]:
    """Collects how many patches each run of the ViT saw."""
    seen, original = [], VisionTransformer.__call__

    def count(vit, patches, grids):
        seen.append(len(patches))
        return original(vit, patches, grids)

    monkeypatch.setattr(VisionTransformer, "__call__", count)
    return seen


def asking(image: Visual, question: str, **values: object) -> Question:
    return Question(Task.X2T_IMAGE, question, (image,), **({"vit_resolution": 56, "max_new_tokens": 6} | values))


def test_a_folder_that_is_not_there_is_refused_at_once(tmp_path):
    with pytest.raises(LanceError, match="does not exist"):
        load(tmp_path / "nowhere")


def test_one_model_is_in_memory_at_a_time(checkpoint, monkeypatch):
    held, original = [], loaded.load_pipeline

    def watch(path, variant, numerics, looks, *rest):
        held.append((variant, looks, model._pipeline))
        return original(path, variant, numerics, looks, *rest)

    monkeypatch.setattr(loaded, "load_pipeline", watch)
    model = load(checkpoint, FLOAT32)
    assert held == []
    first = model.pipeline(Variant.IMAGE, looks=False)
    assert model.pipeline(Variant.IMAGE, looks=False) is first
    assert "vit_model" not in first.model
    second = model.pipeline(Variant.IMAGE, looks=True)
    assert "vit_model" in second.model
    assert model.pipeline(Variant.IMAGE, looks=False) is second
    model.pipeline(Variant.VIDEO, looks=False)
    assert held == [(Variant.IMAGE, False, None), (Variant.IMAGE, True, None), (Variant.VIDEO, False, None)]


def test_a_video_is_generated_step_by_step_and_saved(model, tmp_path):
    steps, written = [], []
    generated = model.generate(Request(Task.T2V, "a bird", 32, 48, 6, num_steps=3), steps.append)
    assert [step.state.index for step in steps] == [0, 1, 2]
    assert np.array_equal(np.array(steps[-1].x_next), np.array(generated.latents).reshape(-1, 48))
    assert generated.latents.shape == (2, 2, 3, 48)
    assert generated.seconds_a_step > 0

    def track(frames):
        for frame in frames:
            written.append(frame)
            yield frame

    generated.save(tmp_path / "bird.mp4", {"why": "a test"}, track)
    assert generated.frames.shape == (5, 32, 48, 3)
    assert generated.frames.dtype == np.uint8
    assert np.array_equal(generated.frames, written)
    metadata = read_metadata(tmp_path / "bird.mp4")
    assert metadata == {**generated.metadata, "why": "a test"}
    assert metadata["request"]["prompt"] == "a bird"
    with pytest.raises(LanceError, match="one frame, not 5"):
        generated.save(tmp_path / "bird.png")


def test_the_request_comes_back_with_the_size_of_its_source(model, image):
    generated = model.generate(Request(Task.IMAGE_EDIT, "make it blue", visuals=(image,), **SMALL))
    assert (generated.request.height, generated.request.width) == (48, 80)
    assert generated.frames.shape == (1, 48, 80, 3)


def test_given_noise_replaces_the_seed(model):
    request = Request(Task.T2I, "a bird", 32, 32, num_steps=2)
    noise = mx.random.normal((4, 48), key=mx.random.key(7))
    made = [np.array(model.generate(request, noise=given).latents) for given in (noise, noise, None)]
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    with pytest.raises(LanceError, match="the noise has shape"):
        model.generate(request, noise=noise[:2])


def test_bad_visuals_are_found_before_a_model_is_read(tmp_path, media):
    model = load(tmp_path)
    text = Visual(str(media / "text.png"), VisualKind.IMAGE)
    with pytest.raises(LanceError, match="text.png"):
        model.generate(Request(Task.I2V, "it moves", num_frames=5, visuals=(text,)))
    with pytest.raises(LanceError, match="text.png"):
        model.answer(asking(text, "what is it"))


def test_a_turn_starts_from_the_latents_of_the_one_before(model, image, monkeypatch, looks):
    first = model.generate(Request(Task.IMAGE_EDIT, "make it blue", visuals=(image,), **SMALL))
    pipeline = model.pipeline(Variant.IMAGE, looks=True)
    contents, encoded = [], []
    prepare, encode = pipeline.prepare_encoded, pipeline.vae.encode
    monkeypatch.setattr(pipeline, "prepare_encoded", lambda *given: contents.append(given[2]) or prepare(*given))
    monkeypatch.setattr(type(pipeline.vae), "encode", lambda vae, pixels: encoded.append(1) or encode(pixels))
    looks.clear()
    second = model.edit_again(first, "add a hat")
    assert len(looks) == 1
    assert encoded == []
    assert np.array_equal(np.array(contents[0][0]), np.array(first.latents))
    assert second.request.task is Task.IMAGE_EDIT
    assert second.latents.shape == first.latents.shape
    third = model.edit_again(second, "in winter", reencode=True)
    assert encoded == [1]
    assert [request.prompt for request in third.earlier] == ["make it blue", "add a hat"]
    assert third.metadata["earlier"][1]["visuals"] == [{"path": "previous turn", "kind": "image"}]


def test_a_callback_that_returns_false_ends_a_generation(model, tmp_path):
    seen, told = [], []
    request = Request("t2i", "a bird", 32, 32, num_steps=5)
    whole = []
    model.generate(request, whole.append)
    stopped = model.generate(
        request, lambda step: seen.append(step) or len(seen) < 2, progress=lambda *t: told.append(t)
    )
    assert len(seen) == stopped.stopped_after == stopped.metadata["stopped_after"] == 2
    assert np.array_equal(np.array(stopped.latents).reshape(-1, 48), np.array(whole[1].x_next))
    assert told[-3:] == [("denoising", 0, 5), ("denoising", 1, 5), ("denoising", 2, 5)]
    assert [done for stage, done, _ in told if stage == "reading"] == list(range(told[0][2] + 1))
    stopped.save(tmp_path / "bird.png")
    assert read_metadata(tmp_path / "bird.png")["stopped_after"] == 2


def test_a_callback_that_returns_false_ends_an_answer(model, image):
    pieces, told = [], []
    question = asking(image, "what is it", max_new_tokens=20)
    stopped = model.answer(question, lambda piece: bool(pieces.append(piece)), lambda *given: told.append(given))
    assert len(pieces) <= 2 and len(stopped.tokens) < len(model.answer(question).tokens)
    assert [stage for stage, *_ in told][:2] == ["looking", "looking"] and told[-1][0] == "reading"
    assert stopped.seconds_reading > 0 and stopped.seconds_a_token > 0


def test_enums_may_be_strings(checkpoint):
    request = Request("i2v", "it moves", num_frames=9, visuals=(Visual("a.png", "image"),), entry="full_sequence")
    assert request == Request(Task.I2V, "it moves", num_frames=9, visuals=request.visuals, entry=Entry.FULL_SEQUENCE)
    assert request.visuals[0].kind is VisualKind.IMAGE and request.entry is Entry.FULL_SEQUENCE
    assert Question("x2t_image", "what", (Visual("a.png", "image"),)).task is Task.X2T_IMAGE
    for wrong in ({"task": "paint"}, {"task": "t2i", "scheduler": "magic"}, {"task": "t2i", "guidance_renorm": "all"}):
        with pytest.raises(LanceError, match="is not supported: choose one of"):
            Request(prompt="a", **wrong)
    opened = load(checkpoint, "float32", vit_source="vit_file", variant="video")
    assert opened.numerics is FLOAT32 and opened.variant_for(Request("t2i", "a")) is Variant.VIDEO
    for wrong in ({"numerics": "int4"}, {"vit_source": "mine"}, {"variant": "both"}):
        with pytest.raises(LanceError):
            load(checkpoint, **wrong)


def test_reprs_are_short(model):
    request = Request("t2i", "a bird " * 500, 32, 32, num_steps=1)
    steps = []
    generated = model.generate(request, steps.append)
    for value in (request, generated, steps[0], steps[0].state, model):
        assert len(repr(value)) < 200, repr(value)
    assert repr(generated) == "Generated(t2i, 1x32x32, seed 42, float32)"
    assert "a bird a bird" in repr(request) and "num_steps=1" in repr(request) and "seed" not in repr(request)


def test_a_notebook_shows_the_image_and_plays_the_video(model):
    still = model.generate(Request("t2i", "a bird", 32, 32, num_steps=1))
    shown = still._repr_mimebundle_()
    assert shown["text/plain"] == repr(still)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(shown["image/png"])))), still.frames[0])
    player = model.generate(Request("t2v", "a bird", 32, 32, 5, num_steps=1))._repr_mimebundle_()["text/html"]
    data = base64.b64decode(player.partition("base64,")[2].partition('"')[0])
    with av.open(io.BytesIO(data)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5


def test_the_package_lists_what_there_is():
    assert dir(lance_mlx) == sorted(lance_mlx.__all__)
    assert all(getattr(lance_mlx, name) is not None for name in dir(lance_mlx))


def test_a_negative_prompt_takes_the_place_of_no_text(model):
    made = []
    for negative in (None, "a cat", "a dog"):
        request = Request("t2i", "a bird", 32, 32, num_steps=2, negative_prompt=negative)
        made.append(np.array(model.generate(request).latents))
    assert len({latents.tobytes() for latents in made}) == 3
    # Guidance away from the prompt itself leads nowhere: the step is the conditional one.
    steps = []
    model.generate(Request("t2i", "a bird", 32, 32, num_steps=2, negative_prompt="a bird"), steps.append)
    assert np.allclose(np.array(steps[0].velocity_uncond), np.array(steps[0].velocity_cond), atol=1e-5)
    with pytest.raises(LanceError, match="negative_prompt acts through guidance"):
        Request("t2i", "a", guidance_scale=1, negative_prompt="b")


def test_an_edit_may_start_from_its_source_under_noise(model, image):
    steps, given = {}, {"visuals": (image,), "vae_resolution": 64, "vit_resolution": 56}
    for strength in (1.0, 0.5):
        request = Request("image_edit", "make it red", num_steps=4, strength=strength, **given)
        steps[strength], told = [], []
        made = model.generate(request, steps[strength].append, progress=lambda *given, told=told: told.append(given))
    assert [step.state.index for step in steps[0.5]] == [2, 3] and made.stopped_after is None
    assert [each[1:] for each in told if each[0] == "denoising"] == [(2, 4), (3, 4), (4, 4)]
    first, noise = steps[0.5][0].state, np.array(steps[1.0][0].state.x_t)
    assert first.t == steps[1.0][2].state.t
    prepared = model.pipeline(request.variant, looks=True).prepare(request)
    source = np.array(prepared.conditions.clean[-1])
    assert np.allclose(np.array(first.x_t), source * (1 - first.t) + noise * first.t, atol=1e-6)
    assert "an edit of strength 0.5, from its source's latents" in made.metadata["departures"]
    with pytest.raises(LanceError, match="strength 0.5 starts from what is edited: task t2i edits nothing"):
        Request("t2i", "a", strength=0.5)


def test_a_video_that_was_drawn_can_be_edited(model):
    drawn = model.generate(Request(Task.T2V, "a bird", 32, 48, 6, num_steps=1, vae_resolution=64, vit_resolution=56))
    edited = model.edit_again(drawn, "make it red")
    assert edited.request.task is Task.VIDEO_EDIT
    assert edited.request.num_frames == 5
    assert edited.frames.shape == drawn.frames.shape
    with pytest.raises(LanceError, match="control token"):
        model.edit_again(drawn, "<|video_pad|>")


def test_an_answer_is_streamed_in_whole_characters(model, image):
    pieces = []
    answer = model.answer(asking(image, "what is it", max_new_tokens=20), pieces.append)
    assert "".join(pieces) == answer.text
    assert 1 <= len(answer.tokens) <= 20
    assert all(pieces)
    assert answer.raw_text.startswith(answer.text) or "<|" in answer.raw_text


def test_a_character_of_several_tokens_comes_whole(real_tokenizer):
    text = "a 鸟 🦜🏽 é"
    ids, completed = real_tokenizer.encode(text), real_tokenizer.stream()
    pieces = [completed(index) for index in ids]
    assert "" in pieces  # some characters do take several tokens
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text


def test_questions_on_one_picture_share_its_reading(model, image, media, looks):
    other = Visual(str(media / "phone.jpg"), VisualKind.IMAGE)
    asked = [
        asking(image, "what is it"),
        asking(image, ""),
        asking(image, "what color", temperature=1.5, seed=3),
        asking(other, "what is it"),
        asking(other, "what is it", as_upstream=True),
        asking(image, "what is it"),
        asking(image, "what is it", instruction="Be brief."),
    ]
    answers = list(model.answer_all(asked))
    assert len(looks) == 5
    assert [answer.question for answer in answers] == asked
    for answer, question in zip(answers, asked, strict=True):
        assert answer.tokens == model.answer(question).tokens


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(alphabet="what is the color?é鸟\n ", max_size=12), min_size=1, max_size=4))
def test_a_batch_of_questions_equals_its_items(model, image, questions):
    asked = [asking(image, question, max_new_tokens=3) for question in questions]
    assert [a.tokens for a in model.answer_all(asked)] == [model.answer(question).tokens for question in asked]
