"""From a request to its segments: the prompt template and the visual blocks."""

import numpy as np

from lance_mlx.prompt_data import PROMPT_DATA
from lance_mlx.request import Request
from lance_mlx.sequence import AttentionMode, Role, Segment, Sequence
from lance_mlx.tokenizer import LanceTokenizer


def build_sequence(request: Request, tokenizer: LanceTokenizer) -> Sequence:
    """The segments of a request (bytedance/Lance data/datasets_custom/validation_dataset.py:t2v_sample).

    The user's text is tokenized by itself and tagged by construction. Upstream tokenizes the whole rendered prompt and
    looks for the ids of the user's text in it: it takes the first match, which lies in the instruction when the prompt
    also occurs there, and fails when a leading line break merges with the template's. Everywhere else the two agree.
    """
    block = _visual_block(Role.NOISE, AttentionMode.NOISE, request.latent_grid, tokenizer)
    if not request.text_template:
        ids = [tokenizer.token_id("<|im_start|>"), *tokenizer.encode(request.prompt), tokenizer.token_id("<|im_end|>")]
        return Sequence((_text(Role.TEXT, ids), block))
    template = PROMPT_DATA["template"]
    before = tokenizer.encode(template["before"].format(instruction=PROMPT_DATA["instructions"][request.task]))
    user = tokenizer.encode(request.prompt)
    after = tokenizer.encode(template["after"])
    if user:
        texts = (_text(Role.TEMPLATE, before), _text(Role.TEXT, user), _text(Role.TEMPLATE, after))
    else:
        texts = (_text(Role.TEMPLATE, before + after),)
    return Sequence((*texts, block, _text(Role.TEMPLATE, tokenizer.encode(template["end"]))))


def _text(role: Role, ids: list[int]) -> Segment:
    return Segment(role, AttentionMode.CAUSAL, np.array(ids, np.int32))


def _visual_block(role: Role, mode: AttentionMode, grid: tuple[int, int, int], tokenizer: LanceTokenizer) -> Segment:
    # One pad token a cell, and the video pad for images too: that is what the model was trained on.
    ids = np.full(int(np.prod(grid)) + 2, tokenizer.token_id("<|video_pad|>"), np.int32)
    ids[0], ids[-1] = tokenizer.token_id("<|vision_start|>"), tokenizer.token_id("<|vision_end|>")
    return Segment(role, mode, ids, grid)
