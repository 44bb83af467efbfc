"""Generated requests of every task, laid out by both sides: the same integers, or refused by both."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_mlx.errors import LanceError
from lance_mlx.requests.request import Entry
from lance_mlx.requests.visuals import PreparedVisual, sized_by_source
from lance_mlx.sampling.schedule import timesteps
from lance_mlx.sequence.positions import latent_position_ids, position_ids, rope_index, unconditional_position_ids
from lance_mlx.sequence.prompt import answer_start, build_question, build_sequence
from lance_mlx.sequence.segments import AttentionMode, Role, Sequence
from lance_mlx.sequence.tokenizer import LanceTokenizer
from parity.lance.replay_mlx import request_from_bundle
from reference.arms import CachedArm, FullSequenceArm, Inputs
from reference.errors import ReferenceError
from reference.layout import Layout, VisualSize
from reference.prompt import Tokenizer
from reference.request import Request
from reference.sampler import time_grid
from reference.sequence import build_layout

ROOT = Path(__file__).parents[2]
PROMPTS = json.loads((ROOT / "lance_mlx" / "data" / "prompts.json").read_text(encoding="utf-8"))
PATCH_VALUES = 1176
GENERATIONS = ["t2i", "t2v", "i2v", "image_edit", "video_edit", "idip"]
QUESTIONS = ["x2t_image", "x2t_video"]

# Anything a user can type, and what is hard to tell from the template or to cut from what is around it.
HARD_TEXTS = [
    *["color", "the objects and background", "user\n", "assistant", "<|im_start|>", "<|im_end|>", "<|im_end|>\n"],
    *["\n", "\r\n", "\n\n ", " ", "\t", "  ", "\u3000", "\u200b", "e\u0301", "é", "日本語", "مرحبا", "🦊"],
    *["'s", "’s", "1234", "<|vision", "|>", "<tool_call>", "<|endoftext|>", "{instruction}", "{vision_type}", ""],
    *[text.split(",")[-1] for text in PROMPTS["instructions"].values()],
]
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
texts = st.lists(st.sampled_from(HARD_TEXTS) | words, max_size=6).map("".join)
sides = st.integers(1, 6).map(lambda cells: 16 * cells)
grids = st.tuples(st.just(1), st.integers(1, 5).map(lambda n: 2 * n), st.integers(1, 5).map(lambda n: 2 * n))


def spec_of(content: str | list[str], kinds: list[str], text_first: bool = True) -> dict:
    """Upstream's interleaved array: one text, and visuals of these kinds."""
    visuals = [f"{index}.{kind}" for index, kind in enumerate(kinds)]
    asks = not isinstance(content, str)
    lists = [([content], ["text"], [int(asks)]), (visuals, kinds, [0] * len(kinds))]
    lists = lists if text_first else lists[::-1]
    names = ("interleave_array", "element_dtype_array", "istarget_in_interleave")
    return {name: first + last for name, first, last in zip(names, *lists, strict=True)}


@st.composite
def images(draw) -> VisualSize:
    return VisualSize((1, draw(sides), draw(sides)), draw(grids))


@st.composite
def videos(draw) -> VisualSize:
    frames = 4 * draw(st.integers(0, 5)) + 1
    _, h, w = draw(grids)
    return VisualSize((frames, draw(sides), draw(sides)), ((frames + 1) // 2, h, w))


@st.composite
def generations(draw, task: str) -> tuple[dict, list[VisualSize]]:
    """A request that draws, in the form of a bundle's, and the sizes of its visuals."""
    prompt, sizes = draw(texts), []
    values = {
        "task": task,
        "spec": prompt,
        "height": draw(sides),
        "width": draw(sides),
        "num_frames": draw(st.integers(5, 30)),
        "num_steps": draw(st.integers(1, 60)),
        "timestep_shift": draw(st.floats(0.25, 12.0)),
    }
    if task in ("t2i", "t2v"):
        return values | {"text_template": draw(st.booleans())}, []
    if task == "idip":
        sizes = draw(st.lists(images(), min_size=1, max_size=3))
    elif task == "i2v":
        size = draw(images())
        sizes = [VisualSize(size.vae)]
    else:
        sizes = [draw(videos() if task == "video_edit" else images())]
    kind = "video" if task == "video_edit" else "image"
    return values | {"spec": spec_of(prompt, [kind] * len(sizes), text_first=draw(st.booleans()))}, sizes


@st.composite
def questions(draw, task: str) -> tuple[dict, list[VisualSize]]:
    """A request that asks, in the form of a bundle's, and the sizes of its visuals."""
    kind = task.removeprefix("x2t_")
    found = draw(st.lists(images() if kind == "image" else videos(), min_size=1, max_size=3 if kind == "image" else 1))
    spec = spec_of([draw(texts), draw(texts), draw(texts)], [kind] * len(found), text_first=False)
    return {"task": task, "spec": spec, "max_new_tokens": draw(st.integers(1, 300))}, [
        VisualSize(None, size.vit) for size in found
    ]


def prepared(size: VisualSize) -> PreparedVisual:
    """A visual of a size, without the memory that its values would take."""

    def blank(*shape: int) -> np.ndarray:
        return np.broadcast_to(np.float32(0), shape)

    return PreparedVisual(
        vit_patches=None if size.vit is None else blank(int(np.prod(size.vit)), PATCH_VALUES),
        vit_grid=size.vit,
        pixels=None if size.vae is None else blank(*size.vae, 3),
    )


@pytest.fixture(scope="module")
def tokenizers() -> tuple[LanceTokenizer, Tokenizer]:
    """Qwen2.5-VL's own tokenizer as each side reads it."""
    folder = ROOT / "tests" / "data" / "tokenizer"
    return LanceTokenizer(folder), Tokenizer(folder)


def check_segments(sequence: Sequence, layout: Layout) -> None:
    """The same segments on both sides, which partition the sequence."""
    ours = [
        (start, len(segment), int(segment.mode), int(segment.role), segment.grid)
        for start, segment in zip(sequence.starts, sequence.segments, strict=True)
    ]
    theirs = [
        (split.start, split.length, int(split.mode), int(split.role), split.grid and astuple(split.grid))
        for split in layout.splits
    ]
    assert ours == theirs
    following = 0
    for start, length, mode, _, grid in ours:
        assert start == following and length > 0
        assert (grid is None) == (mode == AttentionMode.CAUSAL) and (grid is None or length == np.prod(grid) + 2)
        following += length
    assert following == len(layout.text_ids)
    assert_equal(sequence.ids, layout.text_ids)
    assert_equal(sequence.roles, layout.roles)
    assert_equal(sequence.inner_indexes(AttentionMode.FULL), layout.vit_rows)


def astuple(grid) -> tuple[int, int, int]:
    return grid.frames, grid.rows, grid.columns


def assert_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert ours.tobytes() == theirs.tobytes()


def check_generation(tokenizers, values: dict, sizes: list[VisualSize]) -> None:
    visuals = [prepared(size) for size in sizes]
    request = sized_by_source(request_from_bundle(values, "kv_cache"), visuals)
    theirs = Request.from_dict(values)
    sequence = build_sequence(request, tokenizers[0], visuals)
    layout = build_layout(theirs, tokenizers[1], sizes)
    check_segments(sequence, layout)

    latent_blocks = [segment for segment in sequence.segments if segment.is_latent]
    places = np.concatenate([latent_position_ids(segment.grid) for segment in latent_blocks])
    assert_equal(sequence.inner_indexes(AttentionMode.FULL_NOISE, AttentionMode.NOISE), layout.latent_rows)
    assert_equal(places, layout.latent_position_ids)
    assert_equal(sequence.denoised_indexes(), layout.made_rows)
    assert_equal(timesteps(request.num_steps, request.timestep_shift), time_grid(*time_of(theirs)).numpy())

    assert_equal(position_ids(sequence, 2), layout.position_ids)
    # The reference's arms say which tokens each entry feeds, and where it places them.
    inputs = Inputs(None, layout, None, torch.device("cpu"))
    full = FullSequenceArm("uncond", inputs, None)
    assert_equal(np.delete(sequence.ids, np.flatnonzero(sequence.roles == Role.TEXT)), layout.text_ids[full.tokens])
    assert_equal(unconditional_position_ids(sequence, 2, Entry.FULL_SEQUENCE), full.position_ids.numpy())
    cached = CachedArm("uncond", inputs, None)
    fed = [inputs.position_ids[:, inputs.rows_of(split)] for split in cached.splits] + [cached.position_ids]
    fed = torch.cat(fed, 1).numpy()
    assert_equal(unconditional_position_ids(sequence, 2, Entry.KV_CACHE)[:, : fed.shape[1]], fed)
    assert fed.shape[1] == sum(map(len, (*sequence.without(Role.TEXT).prefix, sequence.target)))


def time_of(request: Request) -> tuple[int, float]:
    return request.num_steps, request.timestep_shift


def check_question(tokenizers, values: dict, sizes: list[VisualSize]) -> None:
    question, theirs = request_from_bundle(values, "kv_cache"), Request.from_dict(values)
    sequence = build_question(question, tokenizers[0], [prepared(size) for size in sizes])
    layout = build_layout(theirs, tokenizers[1], sizes)
    check_segments(sequence, layout)
    assert question.max_new_tokens == theirs.max_new_tokens
    assert answer_start(question, tokenizers[0], sequence) == layout.answer
    assert_equal(rope_index(sequence, 2), layout.position_ids)


@pytest.mark.parametrize("task", GENERATIONS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_generations_are_laid_out_alike(tokenizers, task, data):
    check_generation(tokenizers, *data.draw(generations(task)))


@pytest.mark.parametrize("task", QUESTIONS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_questions_are_laid_out_alike(tokenizers, task, data):
    check_question(tokenizers, *data.draw(questions(task)))


def refused_by(check: Callable[[], object], error: type[Exception]) -> bool:
    """Whether a side refuses a request with its own error and one line; what else it raises comes through."""
    try:
        check()
    except error as refusal:
        assert str(refusal) and "\n" not in str(refusal)
        return True
    return False


def outcomes(tokenizers, values: dict, sizes: list[VisualSize]) -> tuple[bool, bool]:
    """Whether lance_mlx and the reference refuse a request."""
    visuals = [prepared(size) for size in sizes]

    def ours() -> None:
        request = request_from_bundle(values, "kv_cache")
        if request.task.answers:
            build_question(request, tokenizers[0], visuals)
        else:
            build_sequence(sized_by_source(request, visuals), tokenizers[0], visuals)

    def theirs() -> None:
        build_layout(Request.from_dict(values), tokenizers[1], sizes)

    return refused_by(ours, LanceError), refused_by(theirs, ReferenceError)


IMAGE, VIDEO = VisualSize((1, 32, 48), (1, 4, 6)), VisualSize((9, 32, 48), (5, 4, 6))
SIZES = {"i2v": VisualSize(IMAGE.vae), "video_edit": VIDEO, "x2t_video": VisualSize(None, VIDEO.vit)}


def plain_request(task: str, text: str = "a bird", count: int = 1) -> tuple[dict, list[VisualSize]]:
    """A request that both sides take, with so many visuals where the task has any."""
    drawn = {"task": task, "spec": text, "height": 32, "width": 48, "num_frames": 5}
    if task in ("t2i", "t2v"):
        return drawn, []
    kinds = ["video" if task in ("video_edit", "x2t_video") else "image"] * count
    sizes = [SIZES.get(task, IMAGE)] * count
    if task in QUESTIONS:
        return {"task": task, "spec": spec_of(["Look.", text, "a bird"], kinds, text_first=False)}, sizes
    return drawn | {"spec": spec_of(text, kinds)}, sizes


@pytest.mark.parametrize("task", [*GENERATIONS, *QUESTIONS])
def test_both_take_a_plain_request_of_every_task(tokenizers, task):
    assert outcomes(tokenizers, *plain_request(task)) == (False, False)


NOT_A_NUMBER, INFINITE = float("nan"), float("inf")
BAD_VALUES = [
    *[("height", 0), ("height", 24), ("width", -16), ("num_steps", 0), ("num_steps", -1)],
    *[("timestep_shift", value) for value in (0.0, -1.0, NOT_A_NUMBER, INFINITE)],
    *[("cfg_text_scale", NOT_A_NUMBER), ("cfg_text_scale", INFINITE), ("cfg_renorm_min", NOT_A_NUMBER)],
    *[("cfg_renorm_type", "locale"), ("cfg_interval", [NOT_A_NUMBER, 1.0])],
]
BAD_FOR_A_TASK = [
    *[(task, key, 1040) for task in ("t2i", "t2v", "idip") for key in ("height", "width")],
    *[(task, "num_frames", frames) for task in ("t2v", "i2v", "idip") for frames in (0, 122)],
    # The first of an i2v's latent frames is given: there have to be more.
    *[("i2v", "num_frames", frames) for frames in (1, 4)],
    *[(task, "text_template", False) for task in GENERATIONS[2:]],
    *[(task, "max_new_tokens", tokens) for task in QUESTIONS for tokens in (0, -1)],
]


@pytest.mark.parametrize(
    ("task", "key", "value"), [(task, *bad) for task in GENERATIONS for bad in BAD_VALUES] + BAD_FOR_A_TASK
)
def test_both_refuse_what_cannot_be_run(tokenizers, task, key, value):
    values, sizes = plain_request(task)
    assert outcomes(tokenizers, values | {key: value}, sizes) == (True, True)


@pytest.mark.parametrize("task", [*GENERATIONS[2:], *QUESTIONS])
def test_both_refuse_a_request_without_its_visual(tokenizers, task):
    assert outcomes(tokenizers, *plain_request(task, count=0)) == (True, True)


@pytest.mark.parametrize("task", [*GENERATIONS, *QUESTIONS])
@settings(deadline=None, max_examples=5)
@given(before=texts, token=st.sampled_from(["vision_start", "vision_end", "video_pad", "image_pad"]), after=texts)
def test_both_refuse_text_with_a_token_that_stands_for_pixels(tokenizers, task, before, token, after):
    assert outcomes(tokenizers, *plain_request(task, f"{before}<|{token}|>{after}")) == (True, True)


@pytest.mark.parametrize("pixels", [(1, 24, 48), (1, 32, 8)])
@pytest.mark.parametrize("task", ["image_edit", "i2v"])
def test_both_refuse_pixels_that_make_no_latents(tokenizers, task, pixels):
    assert outcomes(tokenizers, plain_request(task)[0], [VisualSize(pixels, IMAGE.vit)]) == (True, True)
