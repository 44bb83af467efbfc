"""Template, splits, positions and masks on integers."""

import time

import numpy as np
import pytest
import torch

from reference.errors import ReferenceError
from reference.layout import Mode, Role, build_layout
from reference.mot import visible
from reference.positions import Grid, Text, latent_position_ids, rope_position_ids
from reference.prompt import PROMPTS
from reference.request import Request


def layout_of(tokenizer, spec="A red fox.", **changes):
    request = Request.from_dict({"task": "t2i", "height": 64, "width": 32, "spec": spec} | changes)
    return build_layout(request, tokenizer)


def roles_and_lengths(layout):
    return [(split.role, split.mode, split.length) for split in layout.splits]


def test_template_is_the_rendered_text_cut_at_the_prompt(real_tokenizer):
    layout = layout_of(real_tokenizer)
    text = real_tokenizer.encode("A red fox.")
    assert [split.role for split in layout.splits] == [
        Role.TEMPLATE,
        Role.TEXT,
        Role.TEMPLATE,
        Role.NOISE,
        Role.TEMPLATE,
    ]
    user = layout.splits[1]
    assert layout.text_ids[user.rows].tolist() == text
    assert layout.target.length == 4 * 2 + 2
    assert layout.text_ids[-1] == real_tokenizer.im_end
    assert layout.text_ids[layout.target.start] == real_tokenizer.vision_start
    assert set(layout.text_ids[layout.latent_rows]) == {real_tokenizer.video_pad}


@pytest.mark.parametrize("spec", ["the objects and background", "\nA red fox.", "\n\n  a", " spaced ", "日本語 — ü"])
def test_the_user_owns_exactly_the_prompt(real_tokenizer, spec):
    layout = layout_of(real_tokenizer, spec)
    assert layout.text_ids[layout.roles == Role.TEXT].tolist() == real_tokenizer.encode(spec)
    assert layout.splits[0].length == layout_of(real_tokenizer).splits[0].length


def test_empty_prompt_leaves_one_template_split(real_tokenizer):
    full, empty = layout_of(real_tokenizer), layout_of(real_tokenizer, "")
    assert [split.role for split in empty.splits] == [Role.TEMPLATE, Role.NOISE, Role.TEMPLATE]
    assert empty.splits[0].length == full.splits[0].length + full.splits[2].length
    np.testing.assert_array_equal(empty.position_ids, empty.uncond_position_ids)


def test_without_template_the_text_is_one_split_and_nothing_follows_the_target(real_tokenizer):
    layout = layout_of(real_tokenizer, text_template=False)
    length = len(real_tokenizer.encode("A red fox.")) + 2
    assert roles_and_lengths(layout) == [(Role.TEXT, Mode.CAUSAL, length), (Role.NOISE, Mode.NOISE, 10)]
    assert layout.uncond_position_ids[:, 0].tolist() == [0, 0, 0]
    assert layout.uncond_position_ids.shape == (3, 10)


@pytest.mark.parametrize("token", ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"])
def test_control_tokens_in_the_prompt_are_refused(real_tokenizer, token):
    with pytest.raises(ReferenceError, match="prompt holds"):
        layout_of(real_tokenizer, f"a {token} b")


def test_instructions_differ_by_task(real_tokenizer):
    assert PROMPTS.is_file()
    image, video = layout_of(real_tokenizer), layout_of(real_tokenizer, task="t2v", num_frames=1)
    assert image.text_ids[: image.splits[0].stop].tolist() != video.text_ids[: video.splits[0].stop].tolist()


def test_a_grid_starts_after_the_text_and_text_goes_on_after_its_largest_id():
    ids = rope_position_ids([Text(3), Grid(2, 2, 3), Text(2)], tokens_per_second=2)
    assert ids[:, :3].tolist() == [[0, 1, 2]] * 3
    assert ids[0, 3:15].tolist() == [3] * 6 + [5] * 6
    assert ids[1, 3:9].tolist() == [3, 3, 3, 4, 4, 4]
    assert ids[2, 3:9].tolist() == [3, 4, 5, 3, 4, 5]
    assert ids[:, 15:].tolist() == [[6, 7]] * 3


def test_latent_index_counts_in_a_table_of_64_by_64():
    assert latent_position_ids(Grid(2, 1, 2)).tolist() == [0, 1, 4096, 4097]


def test_the_unconditional_target_is_moved_by_the_dropped_text(real_tokenizer):
    layout = layout_of(real_tokenizer)
    dropped = layout.splits[1].length
    kept = layout.position_ids[:, layout.target.rows] - dropped
    start = layout.target.start - dropped
    np.testing.assert_array_equal(layout.uncond_position_ids[:, start : start + layout.target.length], kept)


def test_the_longest_sequence_is_laid_out_at_once(real_tokenizer):
    request = Request("t2v", "A red panda.", height=480, width=848, num_frames=121)
    start = time.perf_counter()
    layout = build_layout(request, real_tokenizer)
    assert time.perf_counter() - start < 0.5
    assert layout.latent_rows.size == 31 * 30 * 53


def test_mask_of_the_whole_sequence():
    mask = visible(range(7), 7, range(3, 6)).int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 0],
        # The closing token sees no noise.
        [1, 1, 1, 0, 0, 0, 1],
    ]


def test_mask_of_a_prefix_split_behind_a_cache():
    assert visible(range(2, 4), 4, None).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert torch.equal(visible(range(4), 4, None)[2:], visible(range(2, 4), 4, None))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task": "image_edit"}, "task 'image_edit' is not supported yet"),
        ({"height": 60}, "height 60"),
        ({"width": 1040}, "width 1040"),
        ({"task": "t2v", "num_frames": 122}, "num_frames 122"),
        ({"num_steps": 0}, "num_steps 0"),
        ({"num_steps": True}, "num_steps True"),
        ({"timestep_shift": 0}, "timestep_shift 0"),
        ({"timestep_shift": float("nan")}, "timestep_shift nan"),
        ({"cfg_interval": 3}, "cfg_interval 3"),
        ({"cfg_renorm_type": "locale"}, "cfg_renorm_type 'locale'"),
        ({"cfg_renorm_type": 3}, "cfg_renorm_type 3"),
        ({"spec": ["a"]}, "spec"),
        ({"stepz": 3}, "unknown key 'stepz'"),
    ],
)
def test_impossible_requests_are_named(changes, complaint):
    with pytest.raises(ReferenceError, match=complaint):
        Request.from_dict({"task": "t2i", "spec": "a", "height": 64, "width": 64} | changes)


@pytest.mark.parametrize("name", ["", "none", "null", "None", None])
def test_names_of_no_renorm(name):
    assert Request.from_dict({"task": "t2i", "spec": "a", "cfg_renorm_type": name}).cfg_renorm_type.value == "none"
