"""Laws of the integers of a sequence, read from a made-up one: edits of its tokens, positions, roles, lengths."""

import numpy as np
import pytest

from parity.laws import Component, fitted
from parity.laws.segments import CELLS, CLOSING, OPENING, TEXT, Segment
from reference.positions import Grid, Text, rope_position_ids

PARTS = (("the instruction", 40), ("the ViT block", (2, 3, 4)), ("the user's text", 9), ("the source", (1, 3, 4)),
         ("the template's end", 7), ("the target", (3, 4, 6)), ("the closing", 2))  # fmt: skip
POSITIONS = ("frame positions", "row positions", "column positions")


def laid_out(stride=2):
    """The segments and the positions [3, n] of the parts."""
    segments, counted, start = [], [], 0
    for split, (name, part) in enumerate(PARTS):
        if isinstance(part, int):
            pieces = [(name, TEXT, part, None)]
            counted.append(Text(part))
        else:
            cells = int(np.prod(part))
            pieces = [
                (f"the opening bracket of {name}", OPENING, 1, None),
                (f"the cells of {name}", CELLS, cells, part),
                (f"the closing bracket of {name}", CLOSING, 1, None),
            ]
            counted += [Text(1), Grid(*part), Text(1)]
        for own, kind, length, grid in pieces:
            segments.append(Segment(own, kind, name, len(segments), split, start, start + length, grid))
            start += length
    return segments, rope_position_ids(counted, stride)


SEGMENTS, IDS = laid_out()
AT = {segment.name: segment for segment in SEGMENTS}
TARGET = AT["the cells of the target"]


def tokens(seed=0):
    rng = np.random.default_rng(seed)
    ids = np.zeros(IDS.shape[1], np.int32)
    for segment in SEGMENTS:
        fill = {OPENING: 901, CELLS: 900, CLOSING: 902}.get(segment.kind)
        ids[segment.rows] = rng.integers(0, 800, segment.length) if fill is None else fill
    return Component("tokens", {}, {"segments": SEGMENTS, "field": "ids", "axes": ("token ids",), "names": {}}, ids)


def roles():
    own = np.concatenate([np.full(s.length, s.split) for s in SEGMENTS]).astype(np.int32)
    return Component("tokens", {}, {"segments": SEGMENTS, "field": "roles", "axes": ("roles",), "names": {}}, own)


def lengths():
    own = np.bincount(np.concatenate([np.full(s.length, s.split) for s in SEGMENTS])).astype(np.int32)
    units = [Segment(n, TEXT if isinstance(p, int) else CELLS, n, i, i, i, i + 1) for i, (n, p) in enumerate(PARTS)]
    facts = {"segments": SEGMENTS, "units": units, "field": "lengths", "axes": ("lengths",), "counts": True}
    return Component("tokens", {}, facts, own)


def positions():
    return Component("integers", {}, {"segments": SEGMENTS, "axes": POSITIONS, "all": "positions"}, IDS)


def exact(component, got):
    """The smallest law that makes what was computed, to the last integer."""
    found = [law for law in fitted(component, got) if np.array_equal(law.apply(component), got)]
    return min(found, key=lambda law: law.size, default=None)


def edited(change):
    own = tokens().own
    law = exact(tokens(), np.asarray(change(own), np.int32))
    return law and law.sentence, law


EDITS = {
    "the target has 1 row of cells too few": lambda own: np.delete(own, range(TARGET.start, TARGET.start + 6)),
    "the target has 1 frame of cells too many": lambda own: np.insert(own, TARGET.start, [900] * 24),
    "the target has 5 cells too few": lambda own: np.delete(own, range(TARGET.start, TARGET.start + 5)),
    "all brackets are missing": lambda own: own[own < 901],
    "the closing bracket of the source is missing": lambda own: np.delete(own, AT["the cells of the source"].stop),
    "the first 3 tokens of the instruction are missing": lambda own: own[3:],
    "the last 2 tokens of the user's text are missing": lambda own: np.delete(
        own, [AT["the user's text"].stop - 2, AT["the user's text"].stop - 1]
    ),
    "token 55 stands before the instruction": lambda own: np.insert(own, 0, 55),
    "the user's text stands twice": lambda own: np.insert(
        own, AT["the user's text"].stop, own[AT["the user's text"].rows]
    ),
    "the user's text stands before the ViT block": lambda own: np.concatenate(
        [
            own[:40],
            own[AT["the user's text"].rows],
            own[40 : AT["the user's text"].start],
            own[AT["the user's text"].stop :],
        ]  # fmt: skip
    ),
    "the ViT block is missing": lambda own: np.delete(own, range(40, AT["the user's text"].start)),
    "token 2 of the user's text is token 7": lambda own: np.where(
        np.arange(len(own)) == AT["the user's text"].start + 2, 7, own
    ),
    "token ids of cells are 899": lambda own: np.where(own == 900, 899, own),
    "token 55 stands before the instruction and the closing bracket of the source is missing": lambda own: np.insert(
        np.delete(own, AT["the cells of the source"].stop), 0, 55
    ),
}

TURNED = {"the user's text stands before the ViT block": "the ViT block stands before the source"}


@pytest.mark.parametrize("sentence", EDITS)
def test_an_edit_is_told_by_the_names_of_what_it_is_made_in(sentence):
    # What moves past another may be told of either.
    assert edited(EDITS[sentence])[0] in (sentence, TURNED.get(sentence))


def test_roles_and_lengths_follow_of_an_edit():
    for sentence, change in list(EDITS.items())[:9]:
        own = tokens().own
        law = edited(change)[1]
        got = np.asarray(change(own))
        assert len(law.apply(roles())) == law.apply(lengths()).sum() == len(got), sentence


def moved(change):
    got = IDS.copy()
    change(got)
    return got


def rows(name):
    return AT[name].rows


def _stride_alone(ids):
    ids[0, TARGET.rows] = ids[0, TARGET.start] + 2 * (ids[0, TARGET.rows] - ids[0, TARGET.start])


def _from_zero(ids):
    ids[1:, TARGET.rows] -= ids[1:, TARGET.start : TARGET.start + 1]


def _two(ids):
    ids[:, :40] += 1
    ids[2, TARGET.rows] = ids[2, TARGET.start] + (ids[2, TARGET.rows] - ids[2, TARGET.start]) // 2


def _by_columns(ids):
    cells = np.indices((3, 6, 4)).reshape(3, -1)[[0, 2, 1]]
    ids[1:, TARGET.rows] = ids[1:, TARGET.start : TARGET.start + 1] + cells[1:]


def _late(ids):
    ids[:, AT["the template's end"].start :] += 3


def _one(ids):
    ids[:, TARGET.start + 30 :] += 1


def _flat(ids):
    ids[:, TARGET.rows] = ids[:, TARGET.start : TARGET.start + 1] + np.arange(TARGET.length)


MOVED = {
    "positions are off by +1": IDS + 1,
    "positions are at most 60": np.minimum(IDS, 60),
    "positions are the remainder by 64": IDS % 64,
    "positions are 3/2 times as large, rounded down": IDS * 3 // 2,
    "positions are those of the frames": np.stack([IDS[0]] * 3),
    "frame positions of visual blocks are 2 times as large, and what follows counts on from there": laid_out(4)[1],
    "frame positions of the target are 2 times as large within the segment": moved(_stride_alone),
    "row positions and column positions of the cells of the target are 0 at the start and count on from there": (
        moved(_from_zero)
    ),
    "positions of the instruction are off by +1 and column positions of the target are 1/2 times as large, "
    "rounded down within the segment": moved(_two),
    "positions of the cells of the target are counted in the order frames, columns, rows": moved(_by_columns),
    "positions from the template's end on are off by +3": moved(_late),
    f"positions from token {TARGET.start + 30} on are off by +1": moved(_one),
    "positions of the target are counted by token": moved(_flat),
}


@pytest.mark.parametrize("sentence", MOVED)
def test_what_positions_read_instead_is_told_by_segment_and_axis(sentence):
    law = exact(positions(), MOVED[sentence].astype(np.int32))
    assert law is not None and law.sentence == sentence


def test_of_two_causes_each_is_told_by_itself_too():
    got = moved(_two)
    alone = [law for law in fitted(positions(), got) if not np.array_equal(law.apply(positions()), got)]
    assert len(alone) >= 2
    for law in alone:
        value = law.apply(positions())
        assert np.array_equal(value[IDS == got], got[IDS == got]), "what agrees stays as it is"


def test_names_and_counts_are_told_as_such():
    component = roles()
    named = Component("tokens", {}, component.facts | {"names": {1: "1 (vit)", 3: "3 (source)"}}, component.own)
    got = np.where(component.own == 1, 3, component.own)
    assert exact(named, got).sentence == "roles are 3 (source) where 1 (vit) should be"
    got = lengths().own + (np.arange(7) == 5)
    assert exact(lengths(), got).sentence == "lengths of the target are off by +1"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nothing_is_read_from_what_is_right_and_from_noise(seed):
    rng = np.random.default_rng(seed)
    assert fitted(positions(), IDS) == [] and fitted(tokens(), tokens().own) == []
    assert fitted(positions(), rng.integers(0, 99, IDS.shape)) == []
    assert fitted(tokens(), rng.integers(0, 900, IDS.shape[1])) == []
    assert fitted(positions(), IDS[:, :5]) == [] and fitted(positions(), np.zeros((3, 0), np.int32)) == []
    assert fitted(tokens(), np.zeros(0, np.int32)) == []


@pytest.mark.parametrize(
    ("by", "sentence"),
    [
        (1, "the user's text takes in the first token of the source"),
        (3, "the user's text takes in the first 3 tokens of the source"),
        (-2, "the source takes in the last 2 tokens of the user's text"),
    ],
)
def test_a_split_that_ends_elsewhere(by, sentence):
    split = AT["the user's text"].split
    border = AT["the user's text"].stop
    moved = np.concatenate([np.full(s.length, s.split) for s in SEGMENTS])
    moved[min(border, border + by) : max(border, border + by)] = split if by > 0 else split + 1
    law = fitted(roles(), moved.astype(np.int32))[0]
    assert law.sentence == sentence
    # It is told of the lengths too, and leaves the tokens as they are.
    counts = lengths().own + np.array([by * ((i == split) - (i == split + 1)) for i in range(len(PARTS))])
    assert sentence in [each.sentence for each in fitted(lengths(), counts.astype(np.int32))]
    assert np.array_equal(law.apply(lengths()), counts) and np.array_equal(law.apply(tokens()), tokens().own)


def test_what_is_said_of_roles_says_nothing_of_token_ids():
    other = roles().own.copy()
    other[AT["the user's text"].rows] = 9
    law = fitted(roles(), other)[0]
    assert np.array_equal(law.apply(roles()), other) and law.apply(tokens()) is None
