"""Hypotheses about the sequence: its tokens, roles, splits and ways of attending."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from parity.hypotheses.base import Hypothesis
from parity.lance.hypotheses.drafts import (
    Draft,
    Edit,
    Piece,
    added,
    answer_of,
    array_of,
    draft_of,
    encoded,
    replaced,
    texts_of,
    user_text,
)
from reference.layout import Mode, Role
from reference.prompt import PROMPTS, template

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

SEQUENCE = ("sequence", "grids")
CLEAN = (Role.SOURCE, Role.SUBJECT)
QWEN = "You are a helpful assistant."
INSTRUCTIONS = tuple(json.loads(PROMPTS.read_text(encoding="utf-8"))["instructions"])


def edited(name: str, edit: Edit) -> Hypothesis:
    """A hypothesis that the sequence is laid out in another way; several add up where they touch different parts.

    What an edit leaves alone stays as it is.
    """

    def transform(site: "TapProbe", array: np.ndarray) -> np.ndarray | None:
        key = site.tap.name.removeprefix("inputs/")
        draft = draft_of(site, "uncond" if key.endswith(".uncond") else "cond")
        changed = edit(site, draft)
        if changed is None:
            return None
        base, new = (
            answer_of(site.layout, each) if key == "answer" else array_of(key, each) for each in (draft, changed)
        )
        return None if base is None or new is None else added(base, array, new)

    return Hypothesis(name, SEQUENCE, transform=transform)


def grids(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Hypothesis:
    """A hypothesis about grids [visuals, 3] of frames, rows, columns."""

    def transform(site: "TapProbe", array: np.ndarray) -> np.ndarray | None:
        return change(array).astype(array.dtype) if site.tap.name == "inputs/grids_thw" else None

    return Hypothesis(name, ("grids",), transform=transform)


def text(change: Callable[[str, str, str, str], tuple[str, str, str, str]]) -> Edit:
    """Other texts, given the template's before, after and end and the user's own; each is encoded by itself."""

    def edit(site: "TapProbe", draft: Draft) -> Draft | None:
        old = (*template(site.request), user_text(site))
        new, result = change(*old), None
        # The template's end also occurs within the texts before it.
        for i in (2, 1, 3, 0):
            if new[i] != old[i]:
                draft = replaced(draft, encoded(site, old[i]), encoded(site, new[i]), last=i in (1, 2))
                if draft is None:
                    return None
                result = draft
        return result

    return edit


def before(change: Callable[[str], str]) -> Edit:
    return text(lambda before, after, end, user: (change(before), after, end, user))


def user(change: Callable[[str], str]) -> Edit:
    return text(lambda before, after, end, user: (before, after, end, change(user)))


def instructed(key: str) -> Edit:
    """The instruction of another task."""

    def edit(site: "TapProbe", draft: Draft) -> Draft | None:
        instruction = json.loads(PROMPTS.read_text(encoding="utf-8"))["instructions"][key]
        instruction = instruction.replace("{vision_type}", site.request.elements[-1].medium.value)
        return before(lambda old: with_instruction(old, instruction))(site, draft)

    return edit


def with_instruction(before: str, instruction: str) -> str:
    head, _, rest = before.partition("system\n")
    return f"{head}system\n{instruction}<|im_end|>{rest.partition('<|im_end|>')[2]}"


def without_system(before: str) -> str:
    return before.partition("<|im_end|>\n")[2]


def without_breaks(before: str, after: str, end: str, user: str) -> tuple[str, str, str, str]:
    return before.replace("\n", ""), after.replace("\n", ""), end, user


def pieces(change: Callable[[Piece], Piece | None]) -> Edit:
    """Every piece changed, or dropped."""
    return lambda site, draft: [new for piece in draft if (new := change(piece)) is not None]


def without(*roles: Role) -> Edit:
    return pieces(lambda piece: None if piece.role in roles and piece.visual else piece)


def visual(change: Callable[["TapProbe", tuple[int, ...]], tuple[int, ...]], *roles: Role) -> Edit:
    """Tokens of the visual blocks changed."""

    def edit(site: "TapProbe", draft: Draft) -> Draft:
        return [
            replace(piece, tokens=change(site, piece.tokens))
            if piece.visual and (not roles or piece.role in roles) else piece
            for piece in draft
        ]  # fmt: skip

    return edit


def other_pad(site: "TapProbe", tokens: tuple[int, ...]) -> tuple[int, ...]:
    ids = site.pipeline.tokenizer
    return tuple(ids.image_pad if token == ids.video_pad else token for token in tokens)


def exchanged(site: "TapProbe", tokens: tuple[int, ...]) -> tuple[int, ...]:
    return (tokens[-1], *tokens[1:-1], tokens[0])


def moded(old: Mode, new: Mode) -> Edit:
    return pieces(lambda piece: replace(piece, mode=new) if piece.mode is old else piece)


def roled(old: Role, new: Role) -> Edit:
    return pieces(lambda piece: replace(piece, role=new) if piece.role is old else piece)


def moved_first(*roles: Role) -> Callable[[Draft], Draft]:
    """The pieces of some roles before the other content."""

    def move(draft: Draft) -> Draft:
        content = [i for i, piece in enumerate(draft) if piece.role in (Role.TEXT, Role.VIT, *CLEAN)]
        order = sorted(content, key=lambda i: draft[i].role not in roles)
        moved = dict(zip(content, order, strict=True))
        return [draft[moved.get(i, i)] for i in range(len(draft))]

    return move


def ordered(*roles: Role) -> Edit:
    return lambda site, draft: moved_first(*roles)(draft)


def question_first(site: "TapProbe", draft: Draft) -> Draft | None:
    """The text before the visuals; a question's is cut out of the text behind them."""
    if not site.request.understanding:
        return moved_first(Role.TEXT)(draft)
    asked = texts_of(site).user
    cut = replaced(draft, asked, ())
    if cut is None:
        return None
    first = next(i for i, piece in enumerate(cut) if piece.visual)
    return [*cut[:first], Piece(asked, Role.TEMPLATE, Mode.CAUSAL), *cut[first:]]


def bare(site: "TapProbe", draft: Draft) -> Draft | None:
    """No template: a bracketed text, and the visual blocks."""
    ids, words = site.pipeline.tokenizer, texts_of(site)
    held = any(piece.role is Role.TEXT for piece in draft)
    own = Piece((ids.im_start, *words.user, ids.im_end), Role.TEXT, Mode.CAUSAL)
    blocks = [piece for piece in draft if piece.visual]
    given, made = [p for p in blocks if p.mode is not Mode.NOISE], [p for p in blocks if p.mode is Mode.NOISE]
    return [*given, *([own] if held else []), *made]


def merged(site: "TapProbe", draft: Draft) -> Draft:
    """Neighbouring causal splits are one."""
    found: Draft = []
    for piece in draft:
        if found and piece.mode is found[-1].mode is Mode.CAUSAL:
            found[-1] = replace(found[-1], tokens=found[-1].tokens + piece.tokens)
        else:
            found.append(piece)
    return found


def brackets_outside(site: "TapProbe", draft: Draft) -> Draft:
    """The brackets of visual blocks are causal splits of their own."""
    found: Draft = []
    for piece in draft:
        if not piece.visual:
            found.append(piece)
            continue
        found.append(Piece(piece.tokens[:1], piece.role, Mode.CAUSAL))
        found.append(replace(piece, tokens=piece.tokens[1:-1]))
        found.append(Piece(piece.tokens[-1:], piece.role, Mode.CAUSAL))
    return found


def unconditional(edit: Edit) -> Edit:
    """A change of the arm without the user's text alone."""

    def changed(site: "TapProbe", draft: Draft) -> Draft | None:
        return edit(site, draft) if site.tap.name.endswith(".uncond") else None

    return changed


def whole(site: "TapProbe", draft: Draft) -> Draft:
    return draft_of(site, "cond")


def empty_prompt(site: "TapProbe", draft: Draft) -> Draft:
    ids = site.pipeline.tokenizer
    own = Piece((ids.im_start, ids.im_end), Role.TEXT, Mode.CAUSAL)
    blocks = [piece for piece in draft if piece.visual]
    return [own, *blocks]


def target_alone(site: "TapProbe", draft: Draft) -> Draft:
    return [piece for piece in draft if piece.mode is Mode.NOISE]


def framed(site: "TapProbe", draft: Draft) -> Draft:
    """An end-of-text token before everything."""
    token = (site.pipeline.tokenizer.padding,)
    return [replace(draft[0], tokens=token + draft[0].tokens), *draft[1:]]


HYPOTHESES = [
    edited("the instruction has an ASCII apostrophe", before(lambda old: old.replace("’", "'"))),
    edited("the instruction has a typographic apostrophe", before(lambda old: old.replace("'", "’"))),
    *(edited(f"the instruction is that of {key}", instructed(key)) for key in INSTRUCTIONS),
    edited("the instruction is Qwen's own", before(lambda old: with_instruction(old, QWEN))),
    edited("the instruction is empty", before(lambda old: with_instruction(old, ""))),
    edited("there is no instruction", before(without_system)),
    edited("the template is missing", bare),
    edited("the template has no line breaks", text(without_breaks)),
    edited("the template's last line break is missing", text(lambda b, a, e, u: (b, a.removesuffix("\n"), e, u))),
    edited("the closing <|im_end|> is missing", text(lambda b, a, e, u: (b, a, "", u))),
    edited("a line break follows the closing <|im_end|>", text(lambda b, a, e, u: (b, a, e + "\n", u))),
    edited("the assistant's turn is not opened", text(lambda b, a, e, u: (b, "<|im_end|>\n", e, u))),
    edited("a space comes before the prompt", user(lambda prompt: " " + prompt)),
    edited("a line break follows the prompt", user(lambda prompt: prompt + "\n")),
    edited("a full stop follows the prompt", user(lambda prompt: prompt + ".")),
    edited("the prompt is in lower case", user(str.lower)),
    edited("the prompt is stripped", user(str.strip)),
    edited("an end-of-text token comes first", framed),
    edited("image_pad instead of video_pad", visual(other_pad)),
    edited("the closing bracket is one more cell", visual(lambda site, tokens: (*tokens[:-1], tokens[-2]))),
    edited("the brackets are exchanged", visual(exchanged)),
    edited("a visual block has one cell too many", visual(lambda site, tokens: (*tokens[:-1], *tokens[-2:]))),
    edited("a visual block has one cell too few", visual(lambda site, tokens: (*tokens[:-2], tokens[-1]))),
    edited("the ViT block is missing", without(Role.VIT)),
    edited("the clean block is missing", without(*CLEAN)),
    edited("the ViT block and the clean block are missing", without(Role.VIT, *CLEAN)),
    edited("the text comes before the visuals", question_first),
    edited("the clean block comes before the ViT block", ordered(*CLEAN)),
    edited("the user's text has the template's role", roled(Role.TEXT, Role.TEMPLATE)),
    edited("the template has the role of the user's text", roled(Role.TEMPLATE, Role.TEXT)),
    edited("the source has the role of a subject", roled(Role.SOURCE, Role.SUBJECT)),
    edited("the subject has the role of a source", roled(Role.SUBJECT, Role.SOURCE)),
    edited("the source has the role of noise", roled(Role.SOURCE, Role.NOISE)),
    edited("the ViT block has the role of a source", roled(Role.VIT, Role.SOURCE)),
    edited("the ViT block is causal", moded(Mode.FULL, Mode.CAUSAL)),
    edited("the ViT block attends like clean latents", moded(Mode.FULL, Mode.FULL_NOISE)),
    edited("the clean block is causal", moded(Mode.FULL_NOISE, Mode.CAUSAL)),
    edited("the clean block attends like a ViT block", moded(Mode.FULL_NOISE, Mode.FULL)),
    edited("the denoised block is causal", moded(Mode.NOISE, Mode.CAUSAL)),
    edited("the denoised block attends like clean latents", moded(Mode.NOISE, Mode.FULL_NOISE)),
    edited("text and template are one split", merged),
    edited("brackets are splits of their own", brackets_outside),
    edited("the unconditional arm keeps the user's text", unconditional(whole)),
    edited("the unconditional arm is an empty prompt", unconditional(empty_prompt)),
    edited("the unconditional arm is the target alone", unconditional(target_alone)),
    edited("the unconditional arm lacks the ViT block", unconditional(without(Role.VIT))),
    edited("the unconditional arm lacks the clean block", unconditional(without(*CLEAN))),
    edited("the unconditional arm lacks all given visuals", unconditional(without(Role.VIT, *CLEAN))),
    edited("the unconditional arm lacks the template", unconditional(pieces(lambda p: p if p.visual else None))),
    grids("grids count patches instead of cells", lambda thw: thw * np.array([1, 2, 2])),
    grids("rows and columns of grids are exchanged", lambda thw: thw[:, [0, 2, 1]]),
    grids("grids have one frame too many", lambda thw: thw + np.array([1, 0, 0])),
    grids("grids have one frame too few", lambda thw: thw - np.array([1, 0, 0])),
    grids("grids have one frame", lambda thw: np.maximum(thw * np.array([0, 1, 1]), 1)),
]  # fmt: skip
