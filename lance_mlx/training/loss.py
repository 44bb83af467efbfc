"""The training forward: flow matching of latents and cross entropy of answers (bytedance/Lance
modeling/lance/lance.py:forward, train/train_utils.py:compute_training_loss)."""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lance_mlx.model.lance import Lance
from lance_mlx.model.mot import ArmInput, ExpertRows, KVCache
from lance_mlx.model.rope import rotary_table
from lance_mlx.sampling.conditions import Conditions, embed_prefix
from lance_mlx.sequence.segments import AttentionMode
from lance_mlx.training.pack import Draw, FlowState, Sample, flow_state


@dataclass(frozen=True)
class LossSettings:
    """How the loss is put together; the defaults are those of upstream's scripts.

    Attributes:
        timestep_shift: the larger, the more is learned near noise.
        ce_weight, mse_weight: of the two terms.
        by_length: weigh the tokens of an answer of m tokens by 1 / sqrt(m).
    """

    timestep_shift: float = 4.0
    ce_weight: float = 0.25
    mse_weight: float = 1.0
    by_length: bool = False


class Terms(NamedTuple):
    """The errors of one sample, float32.

    Attributes:
        mse: squared error of the velocity of each latent that is learned, [n, 48].
        ce: cross entropy of each label, [m].
    """

    mse: mx.array
    ce: mx.array


class Losses(NamedTuple):
    """Of a pack or a sample's share of it, float32 []: the whole, and its two terms before they are weighted."""

    loss: mx.array
    mse: mx.array
    ce: mx.array

    def __add__(self, other: "Losses") -> "Losses":
        return Losses(*(one + two for one, two in zip(self, other, strict=True)))


class Totals(NamedTuple):
    """What the sums over a pack are divided by: how many latents are learned, and the weights of all labels."""

    latents: int
    labels: float

    @classmethod
    def of(cls, samples: Items[Sample], settings: LossSettings) -> "Totals":
        """Those of some samples; known before anything is computed, so that losses may be summed sample by sample."""
        weights = (len(sample.labels) * label_weight(sample, settings) for sample in samples)
        return cls(sum(sample.noised for sample in samples), sum(weights))


class Pass(NamedTuple):
    """Rows that run together: a visual block, or text segments that follow each other.

    Attributes:
        start, stop: which tokens of the sequence they are.
    """

    rows: ExpertRows
    start: int
    stop: int
    mode: AttentionMode


def label_weight(sample: Sample, settings: LossSettings) -> float:
    """Weight of each label of a sample (bytedance/Lance data/data_utils.py:len2weight)."""
    return len(sample.labels) ** -0.5 if settings.by_length and len(sample.labels) else 1.0


def terms(model: Lance, sample: Sample, drawn: Draw, shift: float, vocabulary: int) -> Terms:
    """Run a sample and compare what it predicts.

    Args:
        drawn: not looked at where nothing is drawn.
        vocabulary: ids that may be answered; the model's head has more, and labels beyond it are not learned.
    """
    state = flow_state(sample, drawn, shift, model.numerics.dtype) if sample.latents else None
    mse, answering = mx.zeros((0,)), []
    labels, before = sample.labels, len(sample.sequence.ids) - 1
    for own, hidden in hidden_states(model, sample, state):
        if own.mode is AttentionMode.NOISE:
            learned = sample.noised
            error = model.llm2vae(hidden.gen[-learned:]) - state.velocity[-learned:]
            mse = error.astype(mx.float32).square()
        elif sample.answer is not None:
            first, last = max(sample.answer - 1, own.start), min(own.stop, before)
            answering.append(hidden.und[first - own.start : max(last, first) - own.start])
    if not answering:
        return Terms(mse, mx.zeros((0,)))
    logits = model.language_model.lm_head(mx.concatenate(answering))[:, :vocabulary].astype(mx.float32)
    ce = nn.losses.cross_entropy(logits, mx.array(np.minimum(labels, vocabulary - 1)))
    return Terms(mse, mx.where(mx.array(labels < vocabulary), ce, 0.0))


def losses_of(found: Terms, sample: Sample, totals: Totals, settings: LossSettings) -> Losses:
    """A sample's share of the losses of its pack."""
    mse = found.mse.mean(axis=-1).sum() / totals.latents if sample.noised else mx.array(0.0)
    ce = label_weight(sample, settings) * found.ce.sum() / totals.labels if len(sample.labels) else mx.array(0.0)
    return Losses(settings.mse_weight * mse + settings.ce_weight * ce, mse, ce)


def hidden_states(model: Lance, sample: Sample, state: FlowState | None) -> Iterator[tuple[Pass, ExpertRows]]:
    """Yield each pass over a sample with its final hidden states.

    A pass sees what was run before it but for the latents that are noised, as in inference; what comes behind the last
    loss is not run.
    """
    config, numerics = model.config, model.numerics
    transformer, cache = model.language_model.model, ()
    for own in passes(model, sample, state):
        rotary = rotary_table(sample.positions[:, own.start : own.stop], config, numerics)
        keep, causal = own.mode is not AttentionMode.NOISE, own.mode is AttentionMode.CAUSAL
        # As in upstream's full-sequence entry, queries and keys are normed in the policy's dtype.
        hidden, caches = transformer(own.rows, [ArmInput(rotary, cache)], causal, qk_float32=False, keep=keep)
        cache: KVCache = caches[0] if keep else cache
        yield own, hidden


def passes(model: Lance, sample: Sample, state: FlowState | None) -> Iterator[Pass]:
    """The passes that a sample takes, in order, up to the last one that something is learned from."""
    segments, starts = sample.sequence.segments, [*sample.sequence.starts, len(sample.sequence.ids)]
    if sample.answer is None:
        segments = segments[: sample.sequence.target_index + 1]
    vit, latent, index = list(sample.vit), 0, 0
    while index < len(segments):
        segment, start = segments[index], starts[index]
        first, index = index, index + 1
        if segment.mode is AttentionMode.CAUSAL:
            while index < len(segments) and segments[index].mode is AttentionMode.CAUSAL:
                index += 1
            parts = embed_prefix(model, segments[first:index], Conditions())
            rows = ExpertRows(mx.concatenate([part.und for part in parts]), None)
        elif segment.is_latent:
            own = slice(latent, latent + len(segment) - 2)
            latent = own.stop
            brackets = model.language_model.model.embed_tokens(mx.array(segment.ids[[0, -1]]))
            times = np.array(state.timesteps[own].astype(mx.float32))
            places = model.latent_pos_embed(segment.grid)
            rows = ExpertRows(brackets, model.embed_latents(state.x_t[own], times, places))
        else:
            (rows,) = embed_prefix(model, [segment], Conditions(vit=(vit.pop(0),)))
        yield Pass(rows, start, starts[index], segment.mode)
