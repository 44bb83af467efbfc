"""Tokenizer, instruction and chat template."""

import json
from pathlib import Path

from transformers import Qwen2Tokenizer
from transformers.utils import logging as transformers_logging

import reference
from reference.errors import ReferenceError
from reference.request import SUBJECT_TASKS, Request

PROMPTS = Path(reference.__file__).parents[1] / "lance_mlx" / "data" / "prompts.json"
PROMPT_KEYS = dict.fromkeys(SUBJECT_TASKS, "subject")
CONTROL = ("<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>")


class Tokenizer:
    """The checkpoint's Qwen2 byte-level BPE, with the ids of the tokens that structure a sequence.

    Raises ReferenceError when a file or a control token is missing.
    """

    def __init__(self, directory: Path) -> None:
        directory = Path(directory)
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            if not (directory / name).is_file():
                raise ReferenceError(f"{directory / name}: not found; the tokenizer's files belong beside the weights")
        transformers_logging.set_verbosity_error()
        try:
            self._bpe = Qwen2Tokenizer.from_pretrained(directory, local_files_only=True)
            self.encode("a")  # some settings are used only then
        except Exception as error:  # transformers raises whatever its parsers raise
            raise ReferenceError(f"{directory}: the tokenizer cannot be read ({error})") from None
        vocabulary = self._bpe.get_vocab()
        for token in (*CONTROL, "<|im_start|>", "<|im_end|>"):
            if token not in vocabulary:
                raise ReferenceError(f"{directory}: the tokenizer has no token {token}; it is not Lance's")
        self.padding = self._bpe.pad_token_id
        self.im_start, self.im_end = vocabulary["<|im_start|>"], vocabulary["<|im_end|>"]
        self.vision_start, self.vision_end, self.video_pad, self.image_pad = (vocabulary[token] for token in CONTROL)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written in it are recognised."""
        return self._bpe.encode(text, add_special_tokens=False)

    def __len__(self) -> int:
        """Number of tokens; logits beyond it belong to none."""
        return len(self._bpe)


def check_text(text: str) -> None:
    """Raise ReferenceError for a text that is no Unicode or holds a visual control token."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ReferenceError("request: the prompt is not valid Unicode; write it as UTF-8") from None
    for token in CONTROL:
        if token in text:
            raise ReferenceError(f"request: the prompt holds {token}, which only the model may place; take it out")


def template(request: Request, instruction: str | None = None) -> tuple[str, str, str]:
    """The template's text before the user's content, between it and the answer, and after the answer.

    The instruction in it depends on the task, an edit's also on what its last element is
    (bytedance/Lance data/common.py:generate_system_prompt); a question brings its own. `instruction` takes its place.
    """
    prompts = json.loads(PROMPTS.read_text(encoding="utf-8"))
    last = request.elements[-1]
    if instruction is not None:
        pass
    elif request.understanding:
        instruction = last.content[0]
    else:
        instruction = prompts["instructions"][PROMPT_KEYS.get(request.task, request.task)]
        instruction = instruction.replace("{vision_type}", last.medium.value)
    pieces = prompts["template"]
    return pieces["before"].replace("{instruction}", instruction), pieces["after"], pieces["end"]
