"""Token sequences and rotary positions that are laid out otherwise."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np

from blind_faults.common import pair, plain, small
from lance_mlx.requests.prompt_data import PROMPT_DATA
from lance_mlx.requests.request import Entry
from lance_mlx.sampling import text
from lance_mlx.sequence import positions, prompt
from lance_mlx.sequence.segments import AttentionMode, Role, Segment, Sequence
from lance_mlx.sequence.tokenizer import LanceTokenizer
from parity.lance.faults.base import ASKS, DRAWS, EDITS, LOOKS, VIDEOS, Patch, Target, function, items, method, together

Segments = list[Segment]
Change = Callable[[Segments, LanceTokenizer], Segments]


def _sequences(change: Change, *names: str) -> Patch:
    """A patch of the segments of requests, of questions or of both."""

    def call(original: Callable, asked: object, tokenizer: LanceTokenizer, *visuals: object) -> Sequence:
        return Sequence(tuple(change(list(original(asked, tokenizer, *visuals).segments), tokenizer)))

    return together(*(function(prompt, name, call) for name in names or ("build_sequence", "build_question")))


def _user(change: Callable[[Segment], Segment]) -> Change:
    return lambda segments, tokenizer: [change(s) if s.role is Role.TEXT else s for s in segments]


def _leading_space(original: Callable, tokenizer: LanceTokenizer, words: str) -> list[int]:
    # The template's pieces are not text of a user.
    return original(tokenizer, words if words.startswith("<|") or not words else " " + words)


def _whole_words(segment: Segment) -> Segment:
    return replace(segment, mode=AttentionMode.FULL)


def _role_runs_on(segments: Segments, tokenizer: LanceTokenizer) -> Segments:
    for i, segment in enumerate(segments[:-1]):
        if segment.role is Role.TEXT:
            after = segments[i + 1]
            longer = replace(segment, ids=np.append(segment.ids, after.ids[:1]).astype(np.int32))
            return [*segments[:i], longer, replace(after, ids=after.ids[1:]), *segments[i + 2 :]]
    return segments


def _closing(segments: Segments, tokenizer: LanceTokenizer) -> Segments:
    changed = []
    for segment in segments:
        if segment.mode is AttentionMode.NOISE:
            ids = segment.ids.copy()
            ids[-1] = tokenizer.token_id("<|video_pad|>")
            segment = replace(segment, ids=ids)
        changed.append(segment)
    return changed


def _template(key: str, change: Callable[[str], str]) -> Patch:
    def patch(target: Target) -> AbstractContextManager[None]:
        template = PROMPT_DATA["template"]
        return items(template, {key: change(template[key])})

    return patch


def _visuals_last(segments: Segments, tokenizer: LanceTokenizer) -> Segments:
    blocks = [s for s in segments if s.mode in (AttentionMode.FULL, AttentionMode.FULL_NOISE)]
    blocks.sort(key=lambda segment: segment.mode, reverse=True)
    rest = iter(blocks)
    return [next(rest) if s.mode in (AttentionMode.FULL, AttentionMode.FULL_NOISE) else s for s in segments]


Place = Callable[[Segment, int, np.ndarray], np.ndarray]


def _blocks(place: Place) -> Patch:
    """A patch of the ids [3, n] of a visual block, brackets included, counted from 0."""

    def call(original: Callable, segment: Segment, tokens_per_second: int) -> np.ndarray:
        ids = original(segment, tokens_per_second)
        return ids if segment.grid is None else place(segment, tokens_per_second, np.array(ids))

    return function(positions, "_segment_positions", call)


def _centred(segment: Segment, tokens_per_second: int, ids: np.ndarray) -> np.ndarray:
    _, rows, columns = segment.grid
    ids[1, 1:-1] -= rows // 2
    ids[2, 1:-1] -= columns // 2
    return ids


def _on_the_bracket(segment: Segment, tokens_per_second: int, ids: np.ndarray) -> np.ndarray:
    ids[:, 1:] -= 1
    return ids


def _first_frame_short(segment: Segment, tokens_per_second: int, ids: np.ndarray) -> np.ndarray:
    frames = (ids[0, 1:-1] - 1) // tokens_per_second
    ids[0, 1:-1] -= frames > 0
    return ids


def _counted_closing(segment: Segment, tokens_per_second: int, ids: np.ndarray) -> np.ndarray:
    ids[:, -1] = len(segment) - 1
    return ids


def _anchored_cell(original: Callable, ids: np.ndarray, sequence: Sequence) -> np.ndarray:
    shifted = original(ids, sequence)
    vit = sequence.roles == Role.VIT
    shifted[0, vit] -= 1
    return shifted


def _kept_target(original: Callable, ids: np.ndarray, sequence: Sequence) -> np.ndarray:
    before = ids.copy()
    shifted = original(ids, sequence)
    noise = sequence.roles == Role.NOISE
    # The axes of the place are taken over from the source, that of time is not.
    shifted[0, noise] = before[0, noise]
    return shifted


def _one_later(original: Callable, sequence: Sequence, tokens_per_second: int, entry: Entry) -> np.ndarray:
    ids = original(sequence, tokens_per_second, entry)
    kept = sequence.without(Role.TEXT)
    ids[:, kept.starts[kept.target_index] :] += 1
    return ids


def _answer_counts(original: Callable, model: object, sequence: Sequence, context: int, *rest: object) -> object:
    reader = original(model, sequence, context, *rest)
    following = reader._positions.shape[1] - context
    reader._positions[:, context:] = context + np.arange(following)
    return reader


FAULTS = [
    plain(
        "blind-sequence-leading-space",
        "sequence",
        method(LanceTokenizer, "encode", _leading_space),
        "The user's words are tokenized with a space before them, SentencePiece's dummy prefix.",
    ),
    plain(
        "blind-sequence-template-stripped",
        "sequence",
        _template("after", str.rstrip),
        "The template is stripped at its end: no line break follows the word assistant.",
    ),
    plain(
        "blind-sequence-user-text-bidirectional",
        "sequence",
        _sequences(_user(_whole_words), "build_sequence"),
        "The user's text is a full split: its tokens see each other in both directions, a prefix language model.",
        tasks=DRAWS,
    ),
    plain(
        "blind-sequence-clean-latents-before-vit",
        "sequence",
        _sequences(_visuals_last, "build_sequence"),
        "The clean latents of a source come before its ViT tokens instead of after them.",
        tasks=EDITS,
    ),
    plain(
        "blind-positions-centred",
        "positions",
        _blocks(_centred),
        "Rows and columns of a visual block are counted from its middle, h - rows // 2 and w - columns // 2, as "
        "Qwen-Image does.",
    ),
    plain(
        "blind-positions-grid-on-the-bracket",
        "positions",
        _blocks(_on_the_bracket),
        "A block's grid starts on the id of its opening bracket instead of one later, and what follows with it.",
    ),
    plain(
        "blind-positions-first-frame-short",
        "positions",
        _blocks(_first_frame_short),
        "The first latent frame, which stands for one picture and not for four, takes 1 position instead of 2: "
        "frames are at 0, 1, 3, 5.",
        tasks=VIDEOS,
    ),
    plain(
        "blind-positions-target-keeps-its-time",
        "positions",
        function(positions, "_shift_by_role", _kept_target),
        "The target of an edit takes over rows and columns of its source's ids but keeps its own time.",
        tasks=EDITS,
    ),
    plain(
        "blind-positions-answer-counts-tokens",
        "positions",
        function(text, "make_decoder", _answer_counts),
        "The ids of an answer's tokens go on from the number of tokens before them instead of from the largest id.",
        tasks=ASKS,
    ),
    small(
        "blind-sequence-role-of-one-token",
        "sequence",
        _sequences(_role_runs_on, "build_sequence"),
        "The user's split is one token too long: it takes in the <|im_end|> behind it, which the unconditional arm "
        "then lacks.",
        tasks=DRAWS,
    ),
    small(
        "blind-sequence-closing-bracket-is-a-pad",
        "sequence",
        _sequences(_closing, "build_sequence"),
        "The closing token of the denoised block is <|video_pad|> instead of <|vision_end|>.",
        tasks=DRAWS,
    ),
    small(
        "blind-sequence-last-word-token-lost",
        "sequence",
        _sequences(
            _user(lambda segment: replace(segment, ids=segment.ids[:-1]) if len(segment) > 1 else segment),
            "build_sequence",
        ),
        "The last token of the user's text is cut off, as if it were an end of sequence.",
        tasks=DRAWS,
    ),
    small(
        "blind-positions-closing-bracket-counts-tokens",
        "positions",
        _blocks(_counted_closing),
        "The closing bracket of a block has its number in the block as its id, on all axes, instead of the largest of "
        "the grid plus 1.",
    ),
    small(
        "blind-positions-vit-anchor-on-a-cell",
        "positions",
        function(positions, "_shift_by_role", _anchored_cell),
        "A ViT block is anchored so that its first cell is at 1000; its opening bracket is at 999.",
        tasks=EDITS,
    ),
    small(
        "blind-positions-unconditional-block-one-later",
        "positions",
        function(positions, "unconditional_position_ids", _one_later),
        "In the unconditional arm alone the ids of the denoised block are one larger on all axes.",
        tasks=DRAWS,
    ),
    pair(
        "blind-pair-positions-centred-and-closing",
        "positions",
        together(_blocks(_centred), _blocks(_counted_closing)),
        "Two faults of a block's ids at once: rows and columns are counted from its middle, and the closing bracket "
        "has its number in the block.",
    ),
    pair(
        "blind-pair-sequence-and-positions",
        "sequence",
        together(_template("after", str.rstrip), _blocks(_on_the_bracket)),
        "Two faults in two places: no line break follows the word assistant (sequence), and a block's grid starts on "
        "the id of its opening bracket (positions).",
        tasks=DRAWS | LOOKS,
    ),
]
