"""Segments, roles and positions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_mlx import Entry, Request, Task
from lance_mlx.requests.prompt_data import PROMPT_DATA
from lance_mlx.sequence.positions import latent_position_ids, position_ids, unconditional_position_ids
from lance_mlx.sequence.prompt import build_sequence
from lance_mlx.sequence.segments import AttentionMode, Role, Segment, Sequence

INSTRUCTION = PROMPT_DATA["instructions"]["t2i"]


def roles_of(sequence: Sequence) -> list[Role]:
    return [segment.role for segment in sequence.segments]


def test_the_users_text_is_a_segment_of_its_own(tokenizer):
    sequence = build_sequence(Request(Task.T2I, "a small red bird", 32, 48), tokenizer)
    assert roles_of(sequence) == [Role.TEMPLATE, Role.TEXT, Role.TEMPLATE, Role.NOISE, Role.TEMPLATE]
    assert sequence.segments[1].ids.tolist() == tokenizer.encode("a small red bird")
    assert sequence.target.grid == (1, 2, 3)


@pytest.mark.parametrize("prompt", ["color", "the objects and background", "\na bird", " \n\n a bird", "image"])
def test_text_that_the_template_also_holds_or_would_merge_with_is_tagged_where_the_user_put_it(tokenizer, prompt):
    plain = build_sequence(Request(Task.T2I, "a small red bird", 32, 32), tokenizer)
    sequence = build_sequence(Request(Task.T2I, prompt, 32, 32), tokenizer)
    assert sequence.segments[1].ids.tolist() == tokenizer.encode(prompt)
    # The template around it does not change with what the user writes.
    for index in (0, 2, 3, 4):
        assert sequence.segments[index].ids.tolist() == plain.segments[index].ids.tolist()


def test_an_empty_prompt_leaves_one_template_segment(tokenizer):
    sequence = build_sequence(Request(Task.T2I, "", 32, 32), tokenizer)
    assert roles_of(sequence) == [Role.TEMPLATE, Role.NOISE, Role.TEMPLATE]
    assert roles_of(sequence.without(Role.TEXT)) == roles_of(sequence)


def test_a_prompt_of_three_thousand_tokens_is_kept_whole(tokenizer):
    prompt = " bird" * 3000
    sequence = build_sequence(Request(Task.T2I, prompt, 32, 32), tokenizer)
    assert len(sequence.segments[1]) >= 3000
    assert sequence.segments[1].ids.tolist() == tokenizer.encode(prompt)


def test_without_the_template_everything_before_the_block_is_the_users(tokenizer):
    sequence = build_sequence(Request(Task.T2I, "a bird", 32, 32, text_template=False), tokenizer)
    assert roles_of(sequence) == [Role.TEXT, Role.NOISE]
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    assert sequence.segments[0].ids.tolist() == [start, *tokenizer.encode("a bird"), end]


def test_the_largest_layout_builds(real_tokenizer):
    request = Request(Task.T2V, "a bird", 480, 848, 121)
    sequence = build_sequence(request, real_tokenizer)
    position_ids(sequence, 2)
    unconditional_position_ids(sequence, 2, Entry.KV_CACHE)
    latent_position_ids(request.latent_grid)
    assert len(sequence.ids) > 49_000


prompts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).filter(lambda text: "<|" not in text)
sides = st.integers(1, 6).map(lambda cells: 16 * cells)
requests = st.builds(Request, st.just(Task.T2V), prompts, sides, sides, st.integers(1, 30), text_template=st.booleans())


@given(requests)
def test_segments_partition_the_sequence(tokenizer, request):
    sequence = build_sequence(request, tokenizer)
    assert sum(map(len, sequence.segments)) == len(sequence.ids) == len(sequence.roles)
    inner = sequence.inner_indexes(AttentionMode.NOISE)
    assert len(inner) == np.prod(request.latent_grid)
    assert set(sequence.roles[inner]) == {Role.NOISE}
    assert (sequence.roles == Role.NOISE).sum() == len(inner) + 2


@given(requests)
def test_positions_count_on_and_dropping_text_moves_only_what_follows(tokenizer, request):
    sequence = build_sequence(request, tokenizer)
    positions = position_ids(sequence, 2)
    following = 0
    for start, segment in zip(sequence.starts, sequence.segments, strict=True):
        piece = positions[:, start : start + len(segment)]
        assert (piece[:, 0] == following).all()
        following = piece.max() + 1
    recomputed = unconditional_position_ids(sequence, 2, Entry.FULL_SEQUENCE)
    cached = unconditional_position_ids(sequence, 2, Entry.KV_CACHE)
    kept = sequence.without(Role.TEXT)
    prefix = kept.starts[kept.target_index]
    assert (recomputed == position_ids(kept, 2)).all()
    assert (cached[:, prefix:] == recomputed[:, prefix:]).all()
    assert (cached[:, :prefix] == positions[:, sequence.roles != Role.TEXT][:, :prefix]).all()


def test_a_latent_frame_advances_time_by_two_and_cells_count_one_by_one(tokenizer):
    sequence = build_sequence(Request(Task.T2V, "a bird", 32, 48, 9), tokenizer)
    start = sequence.starts[sequence.target_index]
    block = position_ids(sequence, 2)[:, start : start + len(sequence.target)]
    t, h, w = block[:, 1:-1].reshape(3, 3, 2, 3) - block[:, :1, None, None] - 1
    assert t[:, 0, 0].tolist() == [0, 2, 4]
    assert h[0, :, 0].tolist() == [0, 1]
    assert w[0, 0].tolist() == [0, 1, 2]
    assert (block[:, -1] == block[:, 1:-1].max() + 1).all()


def block(role: Role, mode: AttentionMode, grid: tuple[int, int, int]) -> Segment:
    return Segment(role, mode, np.zeros(int(np.prod(grid)) + 2, np.int32), grid)


def test_a_source_anchors_the_vit_and_gives_its_ids_to_the_target():
    text = Segment(Role.TEXT, AttentionMode.CAUSAL, np.zeros(5, np.int32))
    vit = block(Role.VIT, AttentionMode.FULL, (1, 2, 2))
    source = block(Role.SOURCE, AttentionMode.FULL_NOISE, (1, 2, 3))
    target = block(Role.NOISE, AttentionMode.NOISE, (1, 2, 3))
    sequence = Sequence((text, vit, source, target))
    positions = position_ids(sequence, 2)
    assert positions[0, 5] == 1000
    assert (positions[1:, 5] == 5).all()
    assert (positions[:, sequence.roles == Role.NOISE] == positions[:, sequence.roles == Role.SOURCE]).all()


def test_a_reference_is_anchored_at_2000_and_never_a_target_alone():
    reference = block(Role.REFERENCE, AttentionMode.FULL_NOISE, (1, 2, 2))
    target = block(Role.NOISE, AttentionMode.NOISE, (1, 2, 3))
    assert position_ids(Sequence((reference, target)), 2)[0, 0] == 2000
    assert position_ids(Sequence((target,)), 2)[0, 0] == 0
