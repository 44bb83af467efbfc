"""From a prompt to token ids: tokenizer, instruction and chat template."""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import Qwen2Tokenizer
from transformers.utils import logging as transformers_logging

import reference
from reference.errors import ReferenceError
from reference.request import Request

PROMPTS = Path(reference.__file__).parents[1] / "lance_mlx" / "data" / "prompts.json"
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
        except Exception as error:  # transformers raises whatever its parsers raise
            raise ReferenceError(f"{directory}: the tokenizer cannot be read ({error})") from None
        vocabulary = self._bpe.get_vocab()
        for token in (*CONTROL, "<|im_start|>", "<|im_end|>"):
            if token not in vocabulary:
                raise ReferenceError(f"{directory}: the tokenizer has no token {token}; it is not Lance's")
        self.im_start, self.im_end = vocabulary["<|im_start|>"], vocabulary["<|im_end|>"]
        self.vision_start, self.vision_end, self.video_pad, self.image_pad = (vocabulary[token] for token in CONTROL)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written in it are recognised."""
        return self._bpe.encode(text, add_special_tokens=False)


@dataclass(frozen=True)
class PromptIds:
    """Token ids around a visual target: template, the user's own text, template, target, end."""

    before: list[int]
    text: list[int]
    after: list[int]
    end: list[int]


def encode_prompt(request: Request, tokenizer: Tokenizer) -> PromptIds:
    """Token ids of the request's prompt in its template (bytedance/Lance validation_dataset.py:t2v_sample).

    The user's text is tokenized by itself, so it is known which tokens are the user's. Upstream tokenizes the whole
    rendering and searches it for the prompt's ids: the same for an ordinary prompt, but it finds the wrong place for a
    prompt that also occurs in the instruction and none for a prompt that begins with a line break.
    Raises ReferenceError for a prompt that holds a visual control token.
    """
    for token in CONTROL:
        if token in request.spec:
            raise ReferenceError(f"request: the prompt holds {token}, which only the model may place; take it out")
    if not request.text_template:
        return PromptIds([], [tokenizer.im_start, *tokenizer.encode(request.spec), tokenizer.im_end], [], [])
    prompts = json.loads(PROMPTS.read_text(encoding="utf-8"))
    template, instruction = prompts["template"], prompts["instructions"][request.task]
    before = template["before"].replace("{instruction}", instruction)
    return PromptIds(
        before=tokenizer.encode(before),
        text=tokenizer.encode(request.spec),
        after=tokenizer.encode(template["after"]),
        end=tokenizer.encode(template["end"]),
    )
