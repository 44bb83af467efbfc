"""From a request to its segments: the prompt template and the visual blocks.

The user's text is tokenized by itself and tagged by construction. Upstream tokenizes the whole rendered prompt and
looks for the ids of the user's text in it: it takes the first match, which lies in the instruction when the prompt also
occurs there, and fails when a leading line break merges with the template's. Everywhere else the two agree.
"""

from collections.abc import Sequence as Items

import numpy as np

from lance_mlx.requests.prompt_data import PROMPT_DATA
from lance_mlx.requests.request import Question, Request, Task
from lance_mlx.requests.visuals import PreparedVisual
from lance_mlx.sequence.segments import AttentionMode, Role, Segment, Sequence
from lance_mlx.sequence.tokenizer import LanceTokenizer

Grid = tuple[int, int, int]
_TEMPLATE = PROMPT_DATA["template"]


def build_sequence(
    request: Request,
    tokenizer: LanceTokenizer,
    visuals: Items[PreparedVisual] = (),
    instruction: str | None = None,
) -> Sequence:
    """The segments of a request (bytedance/Lance data/datasets_custom/validation_dataset.py:t2v_sample, tiv2v_sample).

    Visuals come before the text: for editing and for subjects a ViT block and a clean VAE block each. Image to video
    has neither; its picture is the first latent frame of the denoised block.

    Args:
        instruction: the system's part of the prompt; the task's own when None.
    """
    clean_frames = 1 if request.task is Task.I2V else 0
    target = _visual_block(Role.NOISE, AttentionMode.NOISE, request.latent_grid, tokenizer, clean_frames)
    if not request.text_template:
        ids = [tokenizer.token_id("<|im_start|>"), *tokenizer.encode(request.prompt), tokenizer.token_id("<|im_end|>")]
        return Sequence((_text(Role.TEXT, ids), target))
    if instruction is None:
        instruction = PROMPT_DATA["instructions"][request.task].format(vision_type=_vision_type(request))
    blocks: list[Segment] = []
    if request.task is not Task.I2V:
        role = Role.REFERENCE if request.task is Task.SUBJECT else Role.SOURCE
        for visual in visuals:
            blocks.append(_visual_block(Role.VIT, AttentionMode.FULL, visual.vit_cells, tokenizer))
            blocks.append(_visual_block(role, AttentionMode.FULL_NOISE, visual.latent_grid, tokenizer))
    before = tokenizer.encode(_TEMPLATE["before"].format(instruction=instruction))
    user = tokenizer.encode(request.prompt)
    after = tokenizer.encode(_TEMPLATE["after"])
    return Sequence(
        (*_texts(before, blocks, user, after), target, _text(Role.TEMPLATE, tokenizer.encode(_TEMPLATE["end"])))
    )


def build_question(question: Question, tokenizer: LanceTokenizer, visuals: Items[PreparedVisual]) -> Sequence:
    """The segments of a question (bytedance/Lance data/datasets_custom/validation_dataset.py:x2t_sample).

    The question, the template and the expected answer are one segment; `answer_start` says where an answer begins, by
    construction: upstream takes the first "assistant" line of the sequence, also one that lies in the question.
    """
    instruction = question.instruction
    if instruction is None:
        instruction = PROMPT_DATA["instructions"][question.task]
    before = tokenizer.encode(_TEMPLATE["before"].format(instruction=instruction))
    blocks = [_visual_block(Role.VIT, AttentionMode.FULL, visual.vit_cells, tokenizer) for visual in visuals]
    asked = tokenizer.encode(question.question) + tokenizer.encode(_TEMPLATE["after"])
    last = _text(Role.TEMPLATE, asked + _answered(question, tokenizer))
    return Sequence((_text(Role.TEMPLATE, before), *blocks, last))


def answer_start(question: Question, tokenizer: LanceTokenizer, sequence: Sequence) -> int:
    """Index of the first token of the answer in the sequence of a question."""
    return len(sequence.ids) - len(_answered(question, tokenizer))


def _answered(question: Question, tokenizer: LanceTokenizer) -> list[int]:
    return tokenizer.encode(question.answer) + tokenizer.encode(_TEMPLATE["end"])


def _vision_type(request: Request) -> str:
    return request.vision_type or request.task.takes or ""


def _texts(before: list[int], blocks: list[Segment], user: list[int], after: list[int]) -> list[Segment]:
    """Template, visual blocks, the user's text and template; template pieces that meet are one segment."""
    if user:
        return [_text(Role.TEMPLATE, before), *blocks, _text(Role.TEXT, user), _text(Role.TEMPLATE, after)]
    if blocks:
        return [_text(Role.TEMPLATE, before), *blocks, _text(Role.TEMPLATE, after)]
    return [_text(Role.TEMPLATE, before + after)]


def _text(role: Role, ids: list[int]) -> Segment:
    return Segment(role, AttentionMode.CAUSAL, np.array(ids, np.int32))


def _visual_block(
    role: Role, mode: AttentionMode, grid: Grid, tokenizer: LanceTokenizer, clean_frames: int = 0
) -> Segment:
    # One pad token a cell, and the video pad for images too: that is what the model was trained on.
    ids = np.full(int(np.prod(grid)) + 2, tokenizer.token_id("<|video_pad|>"), np.int32)
    ids[0], ids[-1] = tokenizer.token_id("<|vision_start|>"), tokenizer.token_id("<|vision_end|>")
    return Segment(role, mode, ids, grid, clean_frames)
