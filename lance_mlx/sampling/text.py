"""Answers, token by token."""

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from lance_mlx.backend.numerics import runs_on_cpu
from lance_mlx.model.lance import Lance
from lance_mlx.model.mot import ExpertRows, KVCache
from lance_mlx.requests.request import Entry, Question
from lance_mlx.sampling.conditions import Conditions, GuidanceArm, embed_prefix
from lance_mlx.sequence.positions import rope_index
from lance_mlx.sequence.segments import Segment, Sequence

_BLOCK = 128
"""The full-sequence entry pads the sequence to a multiple of this and fills it with answer."""


class AnswerDecoder(GuidanceArm):
    """Reads a sequence into its cache, then predicts one token after the other.

    What it reads before the question, the reader of another question on the same visuals need not read again.
    """

    _num_read = 0
    _shown: tuple[int, KVCache] = (0, ())

    @property
    def holds_layers(self) -> bool:
        """Whether the model's layers are in memory."""
        return isinstance(self._model.language_model.model.layers, list)

    def take_over(self, earlier: "AnswerDecoder") -> None:
        """Begin with what `earlier` has read before its question; both sequences must be the same up to there."""
        self._num_read, self._cache = self._shown = earlier._shown

    def read(self, tell: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read the segments of the prefix that are not in the cache yet; `tell` is called with how many are."""
        for index in range(self._num_read, len(self.prefix)):
            tell(index, len(self.prefix))
            self.prefill(index)
            if index < len(self.sequence.segments) - 1:
                self._shown = index + 1, self._cache
        self._num_read = len(self.prefix)
        tell(self._num_read, self._num_read)

    def decode(self, step: int, token: mx.array) -> mx.array:
        """Logits [vocabulary] after `token`, an integer [], which is number `step` after the prefix."""
        start = sum(len(rows.und) for rows in self.prefix) + step
        embeds = self._model.language_model.model.embed_tokens(token[None])
        hidden = self.extend(ExpertRows(embeds, None), self.rotary(start, start + 1), causal=True)
        return self._model.language_model.lm_head(hidden.und)[0]


def token_budget(question: Question, context: int) -> int:
    """How many tokens an answer may have after `context` tokens."""
    if question.entry is Entry.KV_CACHE:
        return question.max_new_tokens
    return -(-(question.max_new_tokens + context) // _BLOCK) * _BLOCK - context


def make_decoder(
    model: Lance,
    sequence: Sequence,
    context: int,
    budget: int,
    conditions: Conditions,
    earlier: AnswerDecoder | None = None,
) -> AnswerDecoder:
    """A reader of the first `context` tokens of a sequence, which hold all its visual blocks.

    With an `earlier` reader, whose sequence is the same up to its last segment, what that one has read is taken over
    and `conditions` are not looked at.

    Positions are never shifted by role here; those of new tokens continue the text's
    (bytedance/Lance modeling/lance/lance.py:validation_und_KVcache).
    """
    last = sequence.segments[-1]
    kept = Segment(last.role, last.mode, last.ids[: context - sequence.starts[-1]])
    # The last token of the context is the first one that is decoded.
    read = Segment(last.role, last.mode, kept.ids[:-1])
    asked = Sequence((*sequence.segments[:-1], kept))
    positions = rope_index(asked, model.config.tokens_per_second)
    following = positions.max() + 1 + np.arange(budget)
    positions = np.concatenate([positions, np.tile(following, (3, 1))], axis=1).astype(np.int32)
    segments = (*sequence.segments[:-1], read) if len(read) else sequence.segments[:-1]
    if earlier is None:
        return AnswerDecoder(
            "cond", model, asked, positions, embed_prefix(model, segments, conditions), qk_float32=False
        )
    shown = len(sequence.segments) - 1
    prefix = [*earlier.prefix[:shown], *embed_prefix(model, segments[shown:], Conditions())]
    reader = AnswerDecoder("cond", model, asked, positions, prefix, qk_float32=False)
    reader.take_over(earlier)
    return reader


def answer_tokens(
    reader: AnswerDecoder, question: Question, first: int, budget: int, vocabulary: int, stop: int
) -> Iterator[int]:
    """Yield the tokens of an answer, the stop token included when it comes.

    Args:
        first: the last token of the context.
        vocabulary: number of ids that may be answered; the model's head has more.
        stop: the id that ends an answer.
    """
    reader.read()
    chosen = _chosen(reader, question, first, budget, vocabulary)
    for each in _started_early(chosen) if looks_ahead(reader) else chosen:
        token = each.item()
        yield token
        if token == stop:
            return


def looks_ahead(reader: AnswerDecoder) -> bool:
    """Whether a token is begun before the one before it is known on the host, which a GPU computes meanwhile.

    After the last token, one is begun in vain. Layers that are read while they run are done when they return, so that
    nothing would be gained.
    """
    return not runs_on_cpu() and reader.holds_layers


def _chosen(reader: AnswerDecoder, question: Question, first: int, budget: int, vocabulary: int) -> Iterator[mx.array]:
    """The tokens, not evaluated: each is the input of the next one."""
    token, key = mx.array(first), mx.random.key(question.seed)
    for step in range(budget):
        logits = reader.decode(step, token)[:vocabulary]
        key, draw = mx.random.split(key)
        token = _choose(logits, question, draw)
        yield token


def _started_early(arrays: Iterator[mx.array]) -> Iterator[mx.array]:
    """The same arrays, each when the computation of the next one has been started."""
    before = None
    for array in arrays:
        mx.async_eval(array)
        if before is not None:
            yield before
        before = array
    if before is not None:
        yield before


def _choose(logits: mx.array, question: Question, key: mx.array) -> mx.array:
    if question.temperature == 0:
        return mx.argmax(logits)
    logits = logits.astype(mx.float32) / question.temperature
    if question.top_p < 1:
        order = mx.argsort(-logits)
        reached = mx.cumsum(mx.softmax(logits[order], precise=True))
        # The token that passes the bound is still among them, so there is always one.
        dropped = mx.concatenate([mx.array([False]), reached[:-1] >= question.top_p])
        choice = mx.random.categorical(mx.where(dropped, -mx.inf, logits[order]), key=key)
        return order[choice]
    return mx.random.categorical(logits, key=key)
