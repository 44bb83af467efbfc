"""Template, splits, positions and masks on integers."""

import numpy as np
import pytest
import torch

from reference.errors import ReferenceError
from reference.layout import Mode, Role, VisualSize
from reference.mot import causal, visible
from reference.positions import Grid, Text, latent_position_ids, rope_position_ids
from reference.prompt import PROMPTS
from reference.request import Request
from reference.sequence import build_layout


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


def test_half_a_surrogate_pair_in_the_prompt_is_refused(real_tokenizer):
    with pytest.raises(ReferenceError, match="not valid Unicode"):
        layout_of(real_tokenizer, "a \ud800 b")


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


def test_the_longest_sequence_is_laid_out(real_tokenizer):
    request = Request.from_dict({"task": "t2v", "spec": "A red panda.", "height": 480, "width": 848, "num_frames": 121})
    layout = build_layout(request, real_tokenizer)
    assert layout.latent_rows.size == 31 * 30 * 53


def test_mask_of_the_whole_sequence():
    mask = visible([3, 3, 1], [Mode.CAUSAL, Mode.NOISE, Mode.CAUSAL]).int().tolist()
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


def test_a_full_split_sees_itself_and_is_seen_from_behind():
    mask = visible([1, 2, 2], [Mode.CAUSAL, Mode.FULL_NOISE, Mode.CAUSAL]).int().tolist()
    assert mask == [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_mask_of_a_prefix_split_behind_a_cache():
    assert causal(2, 2).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert torch.equal(visible([4], [Mode.CAUSAL])[2:], causal(2, 2))


SIZE = VisualSize(vae=(1, 32, 48), vit=(1, 4, 6))
SEEN = VisualSize(vit=(1, 4, 6))


def edit(tokenizer, task="image_edit", order=("text", "image"), sizes=(SIZE,), **changes):
    spec = {
        "interleave_array": ["Remove the hat." if kind == "text" else "a.png" for kind in order],
        "element_dtype_array": list(order),
        "istarget_in_interleave": [0] * len(order),
    }
    values = {"task": task, "spec": spec, "height": 64, "width": 32, "num_frames": 9} | changes
    return build_layout(Request.from_dict(values), tokenizer, list(sizes))


def test_an_edit_looks_at_its_source_twice(real_tokenizer):
    layout = edit(real_tokenizer)
    assert [(split.role, split.mode) for split in layout.splits] == [
        (Role.TEMPLATE, Mode.CAUSAL),
        (Role.VIT, Mode.FULL),
        (Role.SOURCE, Mode.FULL_NOISE),
        (Role.TEXT, Mode.CAUSAL),
        (Role.TEMPLATE, Mode.CAUSAL),
        (Role.NOISE, Mode.NOISE),
        (Role.TEMPLATE, Mode.CAUSAL),
    ]
    assert [split.length for split in layout.splits[1:3]] == [2 * 3 + 2, 2 * 3 + 2]
    assert layout.target.size == (1, 32, 48)
    vit, source = layout.vit_splits[0], layout.latent_splits[0]
    assert layout.position_ids[0, vit.start] == 1000
    assert layout.position_ids[1, vit.start] == vit.start
    np.testing.assert_array_equal(layout.position_ids[:, layout.target.rows], layout.position_ids[:, source.rows])
    np.testing.assert_array_equal(layout.latent_position_ids, np.tile([0, 1, 2, 64, 65, 66], 2))


def test_an_edit_of_two_images_takes_the_size_of_the_last_and_its_own_positions(real_tokenizer):
    sizes = (SIZE, VisualSize(vae=(1, 16, 32), vit=(1, 2, 2)))
    layout = edit(real_tokenizer, order=("text", "image", "image"), sizes=sizes)
    assert layout.target.size == (1, 16, 32)
    ids = layout.position_ids
    first, second = (split.start for split in layout.vit_splits)
    # All ViT tokens move together: only the first block begins at the anchor.
    assert ids[0, first] == 1000 and ids[0, second] - 1000 == ids[1, second] - ids[1, first]
    assert ids[0, layout.target.start] == ids[1, layout.target.start]


def test_a_subject_is_anchored_and_does_not_set_the_size(real_tokenizer):
    layout = edit(real_tokenizer, "idip")
    subject = layout.latent_splits[0]
    assert (subject.role, subject.mode) == (Role.SUBJECT, Mode.FULL_NOISE)
    assert layout.position_ids[0, subject.start] == 2000
    assert layout.target.size == (9, 64, 32)
    assert layout.position_ids[0, layout.target.start] < 1000


def test_the_first_latent_frame_of_an_i2v_is_given(real_tokenizer):
    layout = edit(real_tokenizer, "i2v", sizes=[VisualSize(vae=(1, 32, 48))])
    assert len(layout.splits) == 5 and layout.target.size == (9, 32, 48)
    np.testing.assert_array_equal(layout.made_rows, layout.latent_rows[6:])
    assert layout.position_ids.max() < 200


def test_the_instruction_names_what_comes_last(real_tokenizer):
    def text(order):
        layout = edit(real_tokenizer, order=order)
        return layout.text_ids[layout.splits[0].rows].tolist()

    # Where the text is last, the instruction speaks of a text, as upstream's does.
    assert len({tuple(text(order)) for order in (("text", "image"), ("image", "text"), ("text", "video"))}) == 3


def question(tokenizer, order=("image", "text"), sizes=(SEEN,), **changes):
    content = ["Look.", "what is it", "a bird"]
    spec = {
        "interleave_array": [content if kind == "text" else "a.png" for kind in order],
        "element_dtype_array": list(order),
        "istarget_in_interleave": [int(kind == "text") for kind in order],
    }
    return build_layout(Request.from_dict({"task": "x2t_image", "spec": spec} | changes), tokenizer, list(sizes))


def test_a_question_ends_before_its_answer(real_tokenizer):
    layout = question(real_tokenizer)
    assert roles_and_lengths(layout)[1:2] == [(Role.VIT, Mode.FULL, 8)]
    assert [split.role for split in layout.splits] == [Role.TEMPLATE, Role.VIT, Role.TEMPLATE]
    answer = real_tokenizer.encode("a bird")
    assert layout.text_ids[layout.answer :].tolist() == [*answer, real_tokenizer.im_end]
    assert sum(split.length for split in layout.prefix) == layout.answer - 1
    # Nothing is anchored.
    assert layout.position_ids.max() < 100
    np.testing.assert_array_equal(layout.continued_position_ids(2)[:, : layout.answer + 2], layout.position_ids[:, :-1])


def test_a_question_without_template_is_its_pictures(real_tokenizer):
    layout = question(real_tokenizer, text_template=False)
    assert [split.role for split in layout.splits] == [Role.VIT, Role.TEXT]
    assert layout.text_ids[layout.answer - 1] == real_tokenizer.im_start
    assert [split.role for split in layout.prefix] == [Role.VIT]


def test_sizes_must_fit(real_tokenizer):
    for sizes in ((), (VisualSize(vae=(1, 32, 40), vit=(1, 4, 6)),), (VisualSize(vae=(1, 32, 48), vit=(1, 3, 6)),)):
        with pytest.raises(ReferenceError, match="sizes are given|no latents|cannot be merged"):
            edit(real_tokenizer, sizes=sizes)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"order": ("image",)}, "needs one text"),
        ({"order": ("text",), "sizes": ()}, "needs an image"),
        ({"order": ("text", "sound")}, "element type 'sound'"),
        ({"text_template": False}, "text_template false"),
        ({"task": "i2v", "num_frames": 4}, "num_frames 4"),
        ({"spec": "Remove the hat."}, "must hold the lists"),
        ({"spec": {"interleave_array": [], "element_dtype_array": []}}, "must hold the lists"),
        ({"vit_resolution": 0}, "vit_resolution 0"),
    ],
)
def test_impossible_requests_about_visuals_are_named(real_tokenizer, changes, complaint):
    with pytest.raises(ReferenceError, match=complaint):
        edit(real_tokenizer, **changes)


def test_a_question_is_a_triple_behind_its_pictures(real_tokenizer):
    with pytest.raises(ReferenceError, match="come before its text"):
        question(real_tokenizer, order=("text", "image"))
    with pytest.raises(ReferenceError, match="instruction, question, answer"):
        Request.from_dict(
            {
                "task": "x2t_image",
                "spec": {
                    "interleave_array": ["a.png", "what is it"],
                    "element_dtype_array": ["image", "text"],
                    "istarget_in_interleave": [0, 1],
                },
            }
        )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task": "t2x"}, "task 't2x' is not one of"),
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
