"""Errors by role, expert, head, frame and token: a wrong minority is named, whatever the rest is like."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity.lance.names import parse
from parity.lance.rows import BRACKET, layout_of, row_experts, row_frames, row_roles, split_of
from parity.localize.slices import CONCENTRATED, LISTED, MINORITY, place_of, slice_errors, slice_sizes
from reference.layout import Mode
from reference.positions import Grid

LAYER = "language_model.model.layers.1"


@pytest.fixture(scope="session")
def layouts(oracle_of):
    """Layouts of embedded bundles, by their name."""
    return lambda name: oracle_of(name).layout


def place(tap, expected, got, layout):
    return place_of(slice_errors(tap, expected, got, layout), slice_sizes(tap, expected, layout))


def values(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def runs(labels):
    """Labels with how often each comes in a row."""
    starts = [i for i, label in enumerate(labels) if not i or labels[i - 1] != label]
    return [(labels[a], b - a) for a, b in zip(starts, [*starts[1:], len(labels)], strict=True)]


@pytest.mark.parametrize(
    ("name", "call", "roles"),
    [
        ("t2i-fp32-kv", "cond.prefix0", [("template", 64)]),
        ("t2i-fp32-kv", "cond.prefix1", [("prompt", 9)]),
        ("t2i-fp32-kv", "uncond.prefix1", [("template", 7)]),
        ("t2i-fp32-kv", "cond.step3", [(BRACKET, 1), ("noise", 24), (BRACKET, 1)]),
        ("image_edit-fp32-nokv", "cond.prefix1", [(BRACKET, 1), ("ViT", 2), (BRACKET, 1)]),
        ("image_edit-fp32-nokv", "cond.prefix2", [(BRACKET, 1), ("clean VAE", 12), (BRACKET, 1)]),
        ("image_edit-fp32-nokv", "uncond.prefix3", [("template", 7)]),
        ("i2v-fp32-nokv", "cond.step0", [(BRACKET, 1), ("clean frame", 12), ("noise", 24), (BRACKET, 1)]),
        ("x2t_image-bf16-kv", "cond.prefill1", [(BRACKET, 1), ("ViT", 4), (BRACKET, 1)]),
    ],
)
def test_rows_of_a_call_have_the_roles_of_their_split(layouts, name, call, roles):
    layout, tap = layouts(name), parse(f"{call}/{LAYER}")
    split = split_of(tap, layout)
    assert sum(count for _, count in roles) == split.length
    assert runs(row_roles(tap, split.length, layout)) == roles
    if split.grid:
        # The taps of the generation expert, and the embedded brackets, have rows for a part of the tokens.
        assert row_roles(tap, 2, layout) == [BRACKET] * 2
        assert split.length == 4 or runs(row_roles(tap, split.length - 2, layout)) == roles[1:-1]
        assert row_roles(tap, split.length + 1, layout) is None


def test_two_rows_of_a_block_of_two_latents_are_those_of_their_expert(layouts):
    layout = layouts("t2i-fp32-kv")
    splits = [replace(s, length=4, grid=Grid(1, 1, 2)) if s.mode is Mode.NOISE else s for s in layout.splits]
    small, layer = replace(layout, splits=splits), f"cond.step0/{LAYER}"
    assert row_roles(parse(f"{layer}.mlp"), 2, small) == [BRACKET] * 2
    assert row_roles(parse(f"{layer}.mlp_moe_gen"), 2, small) == ["noise"] * 2
    assert row_roles(parse(layer), 4, small) == [BRACKET, "noise", "noise", BRACKET]


def test_rows_of_the_whole_sequence_have_roles(layouts):
    layout = layouts("image_edit-fp32-nokv")
    whole = [("template", 172), (BRACKET, 1), ("ViT", 2), (BRACKET, 2), ("clean VAE", 12), (BRACKET, 1), ("prompt", 6)]
    whole += [("template", 7), (BRACKET, 1), ("noise", 12), (BRACKET, 1), ("template", 1)]
    assert runs(row_roles(parse("inputs/text_ids"), len(layout.text_ids), layout)) == whole
    without = [run for run in whole if run[0] != "prompt"]
    assert runs(row_roles(parse("inputs/text_ids.uncond"), len(layout.kept), layout)) == without
    assert row_roles(parse("inputs/text_ids"), len(layout.text_ids) + 1, layout) is None


@pytest.mark.parametrize(
    "name", ["t2i-fp32-kv", "t2v-bf16-kv", "i2v-fp32-nokv", "image_edit-fp32-nokv", "x2t_image-bf16-kv"]
)
def test_a_bundle_describes_its_own_sequence(oracle_of, name):
    oracle = oracle_of(name)
    described, layout = layout_of(oracle.bundle.inputs), oracle.layout
    assert [(s.rows, s.mode, s.role, s.grid) for s in described.splits] == [
        (s.rows, s.mode, s.role, s.grid) for s in layout.splits
    ]
    assert (described.answer, described.clean_frames) == (layout.answer, layout.clean_frames)


def test_rows_of_other_calls_have_no_role(layouts):
    layout = layouts("t2i-fp32-kv")
    for name in ("vae.decode.chunk0/decoder.conv1", "pixels", "cond.decode0/language_model.lm_head", "cond.prefix9/x"):
        assert row_roles(parse(name), 26, layout) is None


def test_rows_belong_to_experts_and_frames(layouts):
    layout, step = layouts("t2v-fp32-nokv"), parse(f"cond.step0/{LAYER}")
    assert runs(row_experts(step, 38, layout)) == [("UND", 1), ("GEN", 36), ("UND", 1)]
    assert row_experts(step, 36, layout) is None and row_experts(parse(f"cond.prefix0/{LAYER}"), 83, layout) is None
    frames = [("0", 12), ("1", 12), ("2", 12)]
    assert runs(row_frames(step, 38, layout)) == [(BRACKET, 1), *frames, (BRACKET, 1)]
    assert runs(row_frames(step, 36, layout)) == frames
    # States have a row for each latent of the sequence.
    assert runs(row_frames(parse("sampler.x_t2"), 36, layout)) == frames
    assert row_frames(parse("sampler.x_t2"), 35, layout) is None
    # A picture has one frame: no slice.
    assert row_frames(step, 26, layouts("t2i-fp32-kv")) is None


@pytest.mark.parametrize(
    ("name", "tap", "shape", "wrong", "words"),
    [
        ("t2i-fp32-kv", f"cond.step0/{LAYER}.self_attn.q_rope", (26, 4, 16), np.s_[:, 2], "head 2: 100%"),
        ("t2i-fp32-kv", f"cond.step0/{LAYER}", (26, 64), np.s_[[0, -1]], "role brackets: 100%"),
        ("t2i-fp32-kv", f"cond.step0/{LAYER}", (26, 64), np.s_[:, 7], "channel 7: 100%"),
        ("t2i-fp32-kv", f"cond.step0/{LAYER}", (26, 64), np.s_[11], "token 11: 100%"),
        ("i2v-fp32-nokv", f"cond.step1/{LAYER}", (38, 64), np.s_[1:13], "role clean frame: 100%"),
        ("t2v-fp32-nokv", f"cond.step0/{LAYER}.mlp_moe_gen", (36, 64), np.s_[24:], "frame 2: 100%"),
        ("t2v-fp32-nokv", "pixels", (3, 9, 4, 4), np.s_[:, 4], "frame 4: 100%"),
        ("t2v-fp32-nokv", "vae.decode.chunk1/decoder.conv1", (1, 8, 2, 4, 4), np.s_[0, 5], "channel 5: 100%"),
        ("t2v-fp32-nokv", "inputs/position_ids.cond", (3, 40), np.s_[1], "axis 1: 100%"),
    ],
)
def test_a_wrong_minority_is_named(layouts, name, tap, shape, wrong, words):
    expected = values(shape) + 3
    got = expected.copy()
    got[wrong] *= 2
    # What rounding does everywhere else is not named with it.
    got = (got * (1 + 1e-6 * values(shape, 1))).astype(np.float32)
    found = place(parse(tap), expected, got, layouts(name))
    assert found is not None and found.startswith(words)


def test_an_error_that_is_spread_evenly_has_no_place(layouts):
    expected = values((26, 4, 16))
    for got in (expected * np.float32(1.1), expected + values((26, 4, 16), 1)):
        tap = parse(f"cond.step0/{LAYER}.self_attn.sdpa")
        assert place(tap, expected, got, layouts("t2i-fp32-kv")) is None
        assert slice_errors(tap, expected, got, layouts("t2i-fp32-kv"))


def test_a_majority_is_no_place(layouts):
    # All latents but not the brackets: nearly the whole of the tap.
    expected = values((26, 64))
    got = expected.copy()
    got[1:-1] += values((24, 64), 1)
    assert place(parse(f"cond.step0/{LAYER}"), expected, got, layouts("t2i-fp32-kv")) is None


def test_what_cannot_be_subtracted_or_is_equal_has_no_slices(layouts):
    tap, layout = parse(f"cond.step0/{LAYER}"), layouts("t2i-fp32-kv")
    expected = values((26, 64))
    assert slice_errors(tap, expected, expected[:, :5], layout) == []
    assert slice_errors(tap, expected, expected, layout) == []
    assert slice_errors(tap, expected[:0], expected[:0], layout) == [] and slice_sizes(tap, expected[:0], layout) == {}
    # A tap without axes, such as a weight, has no slices either.
    assert slice_errors(parse("weights/vae2llm.weight"), expected, expected + 1, layout) == []


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), scales=st.lists(st.floats(0, 100), min_size=5, max_size=5))
def test_shares_and_sizes_add_up_on_every_axis(layouts, seed, scales):
    tap, layout = parse(f"cond.step0/{LAYER}.self_attn.q_norm"), layouts("t2i-fp32-kv")
    expected = values((26, 5, 3), seed)
    got = expected + values((26, 5, 3), seed + 1) * np.array(scales, np.float32)[None, :, None]
    slices = slice_errors(tap, expected, got, layout)
    sizes = slice_sizes(tap, expected, layout)
    for axis in ("role", "expert", "head", "channel"):
        assert sum(size for name, size in sizes.items() if name.startswith(f"{axis} ")) == pytest.approx(1)
        shares = [item.share for item in slices if item.axis == axis]
        assert shares == sorted(shares, reverse=True)
        if np.any(got != expected):
            assert sum(shares) == pytest.approx(1)
    # Of the 26 tokens only the worst are listed.
    assert sum(item.axis == "token" for item in slices) <= LISTED
    for item in slices:
        if item.axis == "head":
            here = np.s_[:, int(item.label)]
            error = np.linalg.norm(got[here].astype(float) - expected[here]) / np.linalg.norm(expected[here])
            assert item.error == pytest.approx(error, rel=1e-5)


def test_a_slice_of_zeros_is_infinitely_wrong(layouts):
    expected, tap = values((26, 64)), parse(f"cond.step0/{LAYER}")
    expected[:, 3] = 0
    got = expected.copy()
    got[:, 3] = 1
    slices = slice_errors(tap, expected, got, layouts("t2i-fp32-kv"))
    worst = next(item for item in slices if item.axis == "channel")
    assert (worst.label, worst.share, worst.error) == ("3", 1.0, np.inf)
    assert CONCENTRATED > MINORITY
