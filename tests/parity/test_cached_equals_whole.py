"""lance_mlx reads a sequence segment by segment into a cache; the reference runs the whole of it under one mask."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_mlx.backend.numerics import FLOAT32
from lance_mlx.pipeline import Pipeline, Prepared, load
from lance_mlx.requests.request import Question, Variant
from lance_mlx.requests.visuals import PreparedVisual, sized_by_source
from lance_mlx.sampling.conditions import Conditions
from lance_mlx.sampling.text import AnswerDecoder, make_decoder
from lance_mlx.sequence.prompt import answer_start, build_question, build_sequence
from parity.lance.replay_mlx import request_from_bundle
from reference.arms import build_arms
from reference.layout import VisualSize
from reference.model import Pipeline as ReferencePipeline
from reference.numerics import Numerics
from reference.request import Request
from reference.sampler import denoise
from reference.understanding import build_reader

CHECKPOINT = Path(__file__).parents[2] / "oracles" / "checkpoint-a"
# Both agree to 1e-6; a wrong mask or position costs 2e-4 or more.
BOUND = 2e-5
cells = st.integers(1, 3)


@pytest.fixture(scope="module")
def ours() -> Pipeline:
    return load(CHECKPOINT, Variant.VIDEO, FLOAT32)


@pytest.fixture(scope="module")
def theirs() -> ReferencePipeline:
    return ReferencePipeline.load(CHECKPOINT, "Lance_3B_Video", Numerics("float32"))


def relative_error(actual: mx.array, expected: torch.Tensor) -> float:
    actual, expected = np.array(actual, np.float64), expected.double().numpy()
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def visual_of(size: VisualSize) -> PreparedVisual:
    return PreparedVisual(vit_grid=size.vit, pixels=size.vae and np.broadcast_to(np.float32(0), (*size.vae, 3)))


@st.composite
def requests(draw, task: str) -> tuple[dict, list[VisualSize]]:
    """A request of one step, in the form of a bundle's, and the sizes of its visuals."""
    kind = "video" if task == "video_edit" else "image"
    frames = 4 * draw(cells) + 1 if kind == "video" else 1
    sizes = []
    for _ in range(draw(st.integers(1, 3)) if task == "idip" else 1):
        vit = None if task == "i2v" else ((frames + 1) // 2, 2 * draw(cells), 2 * draw(cells))
        sizes.append(VisualSize((frames, 16 * draw(cells), 16 * draw(cells)), vit))
    paths = [f"{index}.{kind}" for index in range(len(sizes))]
    spec = {
        "interleave_array": [draw(st.sampled_from(["", "bird", "make the bird\nblue"])), *paths],
        "element_dtype_array": ["text", *[kind] * len(paths)],
        "istarget_in_interleave": [0] * (1 + len(paths)),
    }
    height, width = 16 * draw(cells), 16 * draw(cells)
    frames = 4 * draw(cells) + 1
    return {"task": task, "spec": spec, "height": height, "width": width, "num_frames": frames, "num_steps": 1}, sizes


@pytest.mark.parametrize("task", ["i2v", "image_edit", "video_edit", "idip"])
@settings(deadline=None, max_examples=6)
@given(data=st.data())
def test_both_arms_equal_one_pass_over_the_whole_sequence(ours, theirs, task, data):
    values, sizes = data.draw(requests(task))
    visuals = [visual_of(size) for size in sizes]
    request = sized_by_source(request_from_bundle(values, "full_sequence"), visuals)
    sequence = build_sequence(request, ours.tokenizer, visuals)
    layout = theirs.layout(Request.from_dict(values), sizes)

    rng = np.random.default_rng(len(layout.text_ids))
    state = rng.standard_normal((len(layout.latent_rows), 48), np.float32)
    clean = [visual.latent_grid for visual in visuals]
    ends = np.cumsum([np.prod(grid) for grid in clean])
    given = [mx.array(part) for part in np.split(state, ends)[:-1]]
    looked_at = [] if task == "i2v" else [np.prod(visual.vit_cells) for visual in visuals]
    vit = [rng.standard_normal((count, ours.model.config.hidden_size), np.float32) for count in looked_at]
    conditions = Conditions(tuple(map(mx.array, vit)), tuple(given))
    # An i2v's frame lies in the denoised block, whose noise has a row for it all the same.
    noise = mx.array(state[len(state) - len(sequence.target) + 2 :])
    (step,) = ours.denoise(Prepared(request, sequence, conditions), noise)

    inputs = theirs.inputs(layout, torch.from_numpy(np.concatenate(vit)) if vit else None)
    asked, x_init = Request.from_dict(values), torch.from_numpy(state)
    (expected,) = denoise(*build_arms(inputs, asked, "full_sequence", x_init), x_init, asked)
    assert relative_error(step.velocity_cond, expected.velocity_cond) <= BOUND
    assert relative_error(step.velocity_uncond, expected.velocity_uncond) <= BOUND


def question_of(kind: str, count: int, text: str) -> dict:
    spec = {
        "interleave_array": [*(f"{index}.{kind}" for index in range(count)), ["Look.", text, "a bird"]],
        "element_dtype_array": [kind] * count + ["text"],
        "istarget_in_interleave": [0] * count + [1],
    }
    return {"task": f"x2t_{kind}", "spec": spec, "max_new_tokens": 4}


def reader_of(
    pipeline: Pipeline,
    question: Question,
    sizes: list[VisualSize],
    vit: list[np.ndarray],
    earlier: AnswerDecoder | None = None,
) -> tuple[AnswerDecoder, int]:
    """A reader of a question about what the ViT is said to have seen, and the last token of the prompt."""
    sequence = build_question(question, pipeline.tokenizer, [visual_of(size) for size in sizes])
    context = answer_start(question, pipeline.tokenizer, sequence)
    conditions = Conditions(tuple(map(mx.array, vit)))
    reader = make_decoder(pipeline.model, sequence, context, question.max_new_tokens, conditions, earlier)
    return reader, int(sequence.ids[context - 1])


@settings(deadline=None, max_examples=8)
@given(st.sampled_from(["image", "video"]), st.integers(1, 3), st.tuples(cells, cells, cells), st.integers(0, 400))
def test_logits_equal_those_of_the_whole_sequence(ours, theirs, kind, count, grid, token):
    count = count if kind == "image" else 1
    t, h, w = grid
    sizes = [VisualSize(None, (t if kind == "video" else 1, 2 * h, 2 * (w + index))) for index in range(count)]
    values = question_of(kind, count, "what is on the fence")
    rng = np.random.default_rng(token)
    hidden = ours.model.config.hidden_size
    vit = [rng.standard_normal((int(np.prod(visual_of(size).vit_cells)), hidden), np.float32) for size in sizes]

    reader, first = reader_of(ours, request_from_bundle(values, "kv_cache"), sizes, vit)
    reader.read()
    inputs = theirs.inputs(theirs.layout(Request.from_dict(values), sizes), torch.from_numpy(np.concatenate(vit)))
    whole, _ = build_reader(inputs, theirs.tokenizer, "full_sequence", 4)
    for step, asked in enumerate([first, token, 7]):
        assert relative_error(reader.decode(step, mx.array(asked)), whole.logits(step, asked)) <= BOUND, step


def test_questions_on_the_same_image_equal_each_alone(ours):
    sizes = [VisualSize(None, (1, 4, 6)), VisualSize(None, (1, 2, 4))]
    rng = np.random.default_rng(0)
    vit = [rng.standard_normal((rows, ours.model.config.hidden_size), np.float32) for rows in (6, 2)]
    earlier = None
    for text in ("what is on the fence", "a bird", "what is the color of the car and of the bird"):
        question = request_from_bundle(question_of("image", 2, text), "kv_cache")
        alone, first = reader_of(ours, question, sizes, vit)
        following, _ = reader_of(ours, question, sizes, vit, earlier)
        for reader in (alone, following):
            reader.read()
        for step, token in enumerate([first, 5, 6]):
            assert np.array_equal(*(each.decode(step, mx.array(token)) for each in (alone, following))), (text, step)
        earlier = following
