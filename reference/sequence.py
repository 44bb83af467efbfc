"""From a request and the sizes of its visuals to the layout of its sequence."""

from dataclasses import dataclass

import numpy as np

from reference.errors import ReferenceError
from reference.layout import MERGE, Layout, Mode, Role, Split, VisualSize
from reference.positions import Grid, Text, anchored, rope_position_ids
from reference.prompt import Tokenizer, check_text, template
from reference.request import PIXELS_PER_CELL, SUBJECT_TASKS, Element, Medium, Request

TOKENS_PER_SECOND = 2
FRAMES_PER_LATENT = 4


@dataclass(frozen=True)
class Piece:
    """Tokens that become a split, or a part of one."""

    tokens: list[int]
    role: Role
    mode: Mode = Mode.CAUSAL
    grid: Grid | None = None
    size: tuple[int, int, int] | None = None


def build_layout(
    request: Request,
    tokenizer: Tokenizer,
    visuals: list[VisualSize] | None = None,
    tokens_per_second: int = TOKENS_PER_SECOND,
) -> Layout:
    """Lay out a request whose visuals have the given sizes (bytedance/Lance validation_dataset.py:*_sample).

    With the template: template, the user's visuals and text, template, target, closing split. A visual of an edit is a
    ViT split and a split of clean latents, of a question a ViT split alone; an i2v's is only in the target. The text
    is tokenized by itself, so it is known which tokens are the user's: upstream searches the whole rendering for the
    prompt's ids, which is the same for an ordinary prompt but finds the wrong place for one that also occurs in the
    instruction and none for one that begins with a line break.
    Raises ReferenceError for a text that holds a visual control token and for sizes that do not fit.
    """
    visuals = visuals or []
    if len(visuals) != len(request.visuals):
        raise ReferenceError(f"the request has {len(request.visuals)} visuals, {len(visuals)} sizes are given")
    for element in request.elements:
        if element.medium is Medium.TEXT:
            check_text("".join(element.content))
    pieces, answered = sequence_pieces(request, tokenizer, visuals)
    clean_frames = 1 if request.task == "i2v" else 0
    return lay_out(pieces, answered if request.understanding else None, clean_frames, tokens_per_second)


def lay_out(
    pieces: list[Piece], answered: int | None, clean_frames: int, tokens_per_second: int, anchors: bool = False
) -> Layout:
    """The layout of pieces in order, of which the last `answered` tokens are an answer; None where there is none.

    Positions in a sequence with an answer are not anchored by role unless `anchors` is set.
    """
    splits: list[Split] = []
    for piece in pieces:
        start = splits[-1].stop if splits else 0
        if splits and piece.role is splits[-1].role is Role.TEMPLATE:
            last = splits.pop()
            splits.append(Split(last.start, last.length + len(piece.tokens), last.mode, last.role))
        elif piece.tokens:
            splits.append(Split(start, len(piece.tokens), piece.mode, piece.role, piece.grid, piece.size))
    text_ids = np.array([token for piece in pieces for token in piece.tokens], np.int32)

    def positions(dropped: Role | None) -> np.ndarray:
        segments: list[Text | Grid] = []
        kept = [split for split in splits if split.role is not dropped]
        for split in kept:
            segments += [Text(1), split.grid, Text(1)] if split.grid else [Text(split.length)]
        ids = rope_position_ids(segments, tokens_per_second)
        unmoved = answered is not None and not anchors
        if unmoved or all(split.mode in (Mode.CAUSAL, Mode.NOISE) for split in kept):
            return ids
        roles = np.concatenate([np.full(split.length, split.role) for split in kept])
        return anchored(ids, *(roles == role for role in (Role.VIT, Role.SUBJECT, Role.SOURCE, Role.NOISE)))

    return Layout(
        text_ids=text_ids,
        splits=splits,
        position_ids=positions(None),
        uncond_position_ids=positions(Role.TEXT),
        answer=None if answered is None else len(text_ids) - answered,
        clean_frames=clean_frames,
    )


def sequence_pieces(request: Request, tokenizer: Tokenizer, visuals: list[VisualSize]) -> tuple[list[Piece], int]:
    """The pieces of a sequence in order, and how many tokens at the end belong to an answer."""
    sizes = iter(visuals)
    user: list[Piece] = []
    for element in in_order(request):
        if element.medium is Medium.TEXT:
            role = Role.TEMPLATE if request.understanding else Role.TEXT
            user.append(Piece(tokenizer.encode(asked(element)), role))
        else:
            user += visual_pieces(request, tokenizer, next(sizes))
    if not request.text_template:
        text = [tokenizer.im_start, *tokenizer.encode(asked(request.elements[-1], answer=True)), tokenizer.im_end]
        plain = [*[piece for piece in user if piece.grid], Piece(text, Role.TEXT)]
        # The bracket before the answer is the last that is read.
        return (plain, len(text) - 1) if request.understanding else ([*plain, target_piece(request, tokenizer, [])], 0)
    before, after, end = (tokenizer.encode(text) for text in template(request))
    pieces = [Piece(before, Role.TEMPLATE), *user, Piece(after, Role.TEMPLATE)]
    if request.understanding:
        answer = tokenizer.encode(asked(request.elements[-1], answer=True))
        return [*pieces, Piece(answer + end, Role.TEMPLATE)], len(answer + end)
    return [*pieces, target_piece(request, tokenizer, visuals), Piece(end, Role.TEMPLATE)], 0


def in_order(request: Request) -> list[Element]:
    """The user's text and visuals in the order of the sequence: a text that comes first goes last."""
    elements = [element for element in request.elements if element.medium is Medium.TEXT or not element.target]
    return elements[1:] + elements[:1] if elements[0].medium is Medium.TEXT else elements


def asked(element: Element, answer: bool = False) -> str:
    """The prompt, or the question or answer of an understanding request."""
    return element.content if isinstance(element.content, str) else element.content[2 if answer else 1]


def visual_pieces(request: Request, tokenizer: Tokenizer, size: VisualSize) -> list[Piece]:
    """The splits that a given visual makes before the target."""
    if request.task == "i2v":
        return []
    if size.vit is None:
        raise ReferenceError(f"a visual of {request.task} needs a grid of patches")
    t, h, w = size.vit
    if min(size.vit) < 1 or h % MERGE or w % MERGE:
        raise ReferenceError(f"a grid of {t} x {h} x {w} patches cannot be merged by {MERGE}")
    pieces = [visual_piece(tokenizer, Role.VIT, Mode.FULL, Grid(t, h // MERGE, w // MERGE))]
    if not request.understanding:
        role = Role.SUBJECT if request.task in SUBJECT_TASKS else Role.SOURCE
        pieces.append(visual_piece(tokenizer, role, Mode.FULL_NOISE, latent_grid(size.vae), size.vae))
    return pieces


def target_piece(request: Request, tokenizer: Tokenizer, visuals: list[VisualSize]) -> Piece:
    """The split of what is made (validation_dataset.py:get_thw)."""
    frames, height, width = request.num_frames, request.height, request.width
    if visuals and request.task not in SUBJECT_TASKS:
        given, height, width = visuals[-1].vae or (0, 0, 0)
        frames = frames if request.task == "i2v" else given
    size = (frames if request.makes_video else 1, height, width)
    return visual_piece(tokenizer, Role.NOISE, Mode.NOISE, latent_grid(size), size)


def visual_piece(
    tokenizer: Tokenizer, role: Role, mode: Mode, grid: Grid, size: tuple[int, int, int] | None = None
) -> Piece:
    tokens = [tokenizer.vision_start, *[tokenizer.video_pad] * grid.size, tokenizer.vision_end]
    return Piece(tokens, role, mode, grid, size)


def latent_grid(size: tuple[int, int, int] | None) -> Grid:
    """Latent frames, rows and columns of a size in pixels; raises ReferenceError for one that has none."""
    frames, height, width = size or (0, 0, 0)
    if min(frames, height, width) < 1 or height % PIXELS_PER_CELL or width % PIXELS_PER_CELL:
        raise ReferenceError(f"{frames} frames of {height}x{width} pixels have no latents; sides are multiples of 16")
    return Grid((frames - 1) // FRAMES_PER_LATENT + 1, height // PIXELS_PER_CELL, width // PIXELS_PER_CELL)
