"""Answering a question: the two entries, and greedy decoding."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from reference.arms import Inputs, check_entry
from reference.errors import ReferenceError
from reference.layout import Mode
from reference.mot import KVCache, visible
from reference.prompt import Tokenizer

# The full-sequence entry pads the question and its answer to a multiple of this, and answers up to there.
BLOCK = 128


class Reader(Protocol):
    """What reads a question and says which token comes next."""

    name: str
    prefixes: int

    def prefill(self, index: int) -> None:
        """Run split number `index` of the question, which lacks its last token."""

    def logits(self, index: int, token: int) -> Tensor:
        """Logits [vocabulary] behind one more token; the first is the question's last."""


class CachedReader:
    """The question split by split into a cache, then token by token (lance.py:validation_und_KVcache)."""

    name = "cond"

    def __init__(self, inputs: Inputs, limit: int) -> None:
        self.inputs = inputs
        self.splits = inputs.layout.prefix
        self.prefixes = len(self.splits)
        self.position_ids = torch.from_numpy(inputs.layout.continued_position_ids(limit)).to(inputs.device)
        self.cache = KVCache()

    @torch.inference_mode()
    def prefill(self, index: int) -> None:
        self.inputs.prefill(self.splits[index], self.cache)

    @torch.inference_mode()
    def logits(self, index: int, token: int) -> Tensor:
        model, place = self.inputs.model.language_model, self.cache.length
        ids = torch.tensor([token], device=self.inputs.device)
        hidden = model(
            inputs_embeds=model.model.embed_tokens(ids),
            position_ids=self.position_ids[:, place : place + 1],
            gen=torch.zeros(1, dtype=torch.bool, device=self.inputs.device),
            mask=None,
            cache=self.cache,
            keep=True,
            raise_qk=False,
        )
        return model.lm_head(hidden)[0]


class FullSequenceReader:
    """The whole sequence again for every token (lance.py:validation_video_to_text).

    The sequence is padded to its final length from the start: nothing before it sees the padding, but in bfloat16 the
    order in which the attention kernel sums depends on the length.
    """

    name, prefixes = "cond", 0

    def __init__(self, inputs: Inputs, tokenizer: Tokenizer, limit: int) -> None:
        self.inputs = inputs
        layout, device = inputs.layout, inputs.device
        self.context = layout.answer - 1
        asked = inputs.embed(torch.arange(self.context, device=device), None, None)[0]
        padding = self.embed(tokenizer.padding).expand(1 + limit, -1)
        self.embeds = torch.cat([asked, padding])
        self.position_ids = torch.from_numpy(layout.continued_position_ids(limit)).to(device)
        lengths = [*(split.length for split in layout.prefix), 1 + limit]
        self.mask = visible(lengths, [*(split.mode for split in layout.prefix), Mode.CAUSAL]).to(device)

    def embed(self, token: int) -> Tensor:
        ids = torch.tensor([token], device=self.inputs.device)
        return self.inputs.model.language_model.model.embed_tokens(ids)

    def prefill(self, index: int) -> None:
        raise ReferenceError("the full-sequence entry has no prefix to run")

    @torch.inference_mode()
    def logits(self, index: int, token: int) -> Tensor:
        model, place = self.inputs.model.language_model, self.context + index
        self.embeds[place] = self.embed(token)[0]
        hidden = model(
            inputs_embeds=self.embeds,
            position_ids=self.position_ids,
            gen=torch.zeros(len(self.embeds), dtype=torch.bool, device=self.inputs.device),
            mask=self.mask,
            cache=KVCache(),
            keep=False,
            raise_qk=False,
        )
        return model.lm_head(hidden[place : place + 1])[0]


def build_reader(inputs: Inputs, tokenizer: Tokenizer, entry: str, max_new_tokens: int) -> tuple[Reader, int]:
    """The reader of an entry, and the most tokens that it answers."""
    check_entry(entry)
    if entry == "kv_cache":
        return CachedReader(inputs, max_new_tokens), max_new_tokens
    asked = inputs.layout.answer
    limit = -(-(asked + max_new_tokens) // BLOCK) * BLOCK - asked
    return FullSequenceReader(inputs, tokenizer, limit), limit


def answer(reader: Reader, inputs: Inputs, tokenizer: Tokenizer, limit: int) -> Iterator[int]:
    """The answer's token ids, each the likeliest, up to and including <|im_end|>; splits of the question run first.

    Logits that belong to no token are never chosen.
    """
    for index in range(reader.prefixes):
        reader.prefill(index)
    token = int(inputs.layout.text_ids[inputs.layout.answer - 1])
    for index in range(limit):
        token = int(reader.logits(index, token)[: len(tokenizer)].argmax())
        yield token
        if token == tokenizer.im_end:
            return
