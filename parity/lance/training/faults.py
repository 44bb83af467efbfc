"""Ways to be wrong in training: a catalogue of faults that break lance_mlx in one piece each."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
import numpy as np

from lance_mlx.model.lance import TimestepEmbedder
from lance_mlx.model.mot import ExpertRows, KeyValues
from parity.lance.faults.base import rounded, wrapped
from parity.lance.training import breaking as b
from parity.lance.training.breaking import stop
from parity.lance.training.bundle import TrainingBundle

ANY, DRAWS, GIVEN, ANSWERS, EMBEDDINGS, PACK = "", "draws", "given latents", "answers", "learned embeddings", "several"
"""What a bundle has to have for a fault to show."""


@dataclass(frozen=True)
class TrainingFault:
    """One way to be wrong, confined to one component.

    Attributes:
        name: unique, in kebab-case.
        about: one sentence: what is done instead.
        component: fnmatch pattern of what is found wrong first.
        explanation: regular expression that the cause, in words, has to match.
        patch: breaks lance_mlx, and mends it when the context ends.
        needs: what a bundle has to have for it to show.
    """

    name: str
    about: str
    component: str
    explanation: str
    patch: Callable[[], AbstractContextManager[object]] = field(repr=False)
    needs: str = ANY

    def suits(self, bundle: TrainingBundle) -> bool:
        """Whether it shows in a bundle's run."""
        tasks = {asked.task for asked in bundle.samples}
        return {
            ANY: True,
            DRAWS: tasks != {"x2t_image"},
            GIVEN: "i2v" in tasks,
            ANSWERS: "x2t_image" in tasks,
            EMBEDDINGS: not bundle.training["freeze_llm_embed_tokens"],
            PACK: len(bundle.samples) > 1,
        }[self.needs]


F = TrainingFault
_HALF = 0.5
FAULTS = [
    F("no-gradient-to-keys", "Attention passes no gradient to its keys.", "*.sdpa", "is 0",
      b.attending(lambda attend, q, kv: attend(q, KeyValues(stop(kv.keys), kv.values)))),
    F("no-gradient-to-values", "Attention passes no gradient to its values.", "*.sdpa", "is 0",
      b.attending(lambda attend, q, kv: attend(q, KeyValues(kv.keys, stop(kv.values))))),
    F("no-gradient-to-queries", "Attention passes no gradient to its queries.", "*.sdpa", "is 0",
      b.attending(lambda attend, q, kv: attend(stop(q), kv))),
    F("queries-unscaled-in-gradient", "The gradient of queries lacks the scale of scores.", "*.sdpa", "times as large",
      b.attending(lambda attend, q, kv: attend(b.times(q, 4.0), kv))),
    F("softmax-sum-constant", "The softmax's sum is a constant in the gradient.", "*.sdpa",
      "softmax's sum is taken as a constant", b.constant_sum),
    F("first-of-shared-heads", "Of the heads that share keys the first alone passes a gradient to them.", "*.sdpa",
      "the first alone counts", b.attending(b.first_of_heads)),
    F("cache-detached", "No gradient goes to the keys and values of earlier passes.", "*.sdpa", "it is 0",
      b.past(stop)),
    F("norm-scale-constant", "The root mean square is a constant in the gradient.", "*norm*",
      "root mean square is taken as a constant", b.norm(lambda w, x, scale: w * x * stop(scale))),
    F("norm-unweighted", "A norm's gradient lacks its weight.", "*norm*", "weight is left out",
      b.norm(lambda w, x, scale: x * scale + w * stop(x * scale))),
    F("norm-weight-by-input", "The gradient of a norm's weight is by what is not normed.", "*norm*",
      "by what is not normed", b.norm(lambda w, x, scale: stop(w) * x * scale + w * stop(x))),
    F("rope-onwards", "RoPE turns the gradient onwards instead of back.", "*_rope", "onwards instead of back",
      b.turned(lambda one, two, t: (one * t.cos + two * t.sin, two * t.cos - one * t.sin))),
    F("rope-not-turned-back", "RoPE passes its gradient on as it is.", "*_rope", "is not turned back",
      b.turned(lambda one, two, t: (one, two))),
    F("silu-straight-through", "SiLU passes its gradient on unchanged.", "*.activation", "unchanged",
      b.gated(lambda g: g)),
    F("silu-by-sigmoid", "Of SiLU's gradient the sigmoid alone is taken.", "*.activation", "the sigmoid alone",
      b.gated(lambda g: g * stop(mx.sigmoid(g)))),
    F("bias-averaged", "A bias's gradient is averaged over tokens.", "*_proj*", "times as large",
      b.linear(b.mean_bias)),
    F("linear-input-halved", "Linears pass half of their gradient on.", "*", "0.5 times as large",
      b.linear(lambda m, x, y: b.regraded(y, m.product(b.times(x, _HALF), m)))),
    F("linear-weights-in-bfloat16", "The gradient of weights is by inputs rounded to bfloat16.", "*",
      "rounded to bfloat16",
      b.linear(lambda m, x, y: b.regraded(y, m.product(b.regraded(rounded(x), x), m)))),
    F("residual-detached", "The stream passes no gradient around attention.", "*residual",
      "no gradient around attention",
      b.layer(lambda x, attended: b.each(stop, x) + attended)),
    F("attention-branch-detached", "The attention branch passes no gradient on.", "layers.*.residual", "is 0",
      b.layer(lambda x, attended: x + b.each(stop, attended))),
    F("mlp-branch-twice", "The MLP branch's gradient is there twice.", "layers.*.residual", "2 times as large",
      b.fed_twice),
    F("generation-branch-detached", "The attention branch of latents passes no gradient on.", "layers.*.residual",
      "is 0", b.layer(lambda x, attended: x + ExpertRows(
          attended.und, None if attended.gen is None else stop(attended.gen))), DRAWS),
    F("embedding-detached", "Nothing is learned of embeddings: the tied gradient is lost.", "embed_tokens", "is 0",
      b.embedded(lambda rows, ids: stop(rows)), EMBEDDINGS),
    F("head-detached", "The head's weight learns nothing.", "lm_head", "is 0", b.head(stop), EMBEDDINGS),
    F("times-detached", "The embedding of times learns nothing.", "time_embedder*", "is 0",
      lambda: wrapped(TimestepEmbedder, "__call__", lambda original, *given: stop(original(*given))), DRAWS),
    F("gradient-past-checkpoint-lost", "A checkpointed layer passes no gradient to earlier passes.", "checkpointing",
      "differ", b.checkpoint(lambda f: mx.checkpoint(lambda p, rows, pasts: f(p, rows, [
          [stop(each) for each in past] for past in pasts])))),
    F("checkpoint-learns-nothing", "A checkpointed layer's parameters are not handed in.", "checkpointing", "is 0",
      b.checkpoint(lambda f: lambda p, rows, pasts: mx.checkpoint(lambda rows, pasts: f(
          b.detached(p), rows, pasts))(rows, pasts))),
    F("latents-miscounted", "The sum over latents is divided by all tokens.", "loss", "times as large",
      b.total(latents=lambda count: 114), DRAWS),
    F("labels-miscounted", "The sum over labels is divided by one more.", "loss", "times as large",
      b.total(labels=lambda count: count + 1), ANSWERS),
    F("channels-summed", "Channels are summed rather than averaged.", "loss", "48 times as large",
      b.losses(lambda found, settings: settings.mse_weight * 48 * found.mse + settings.ce_weight * found.ce), DRAWS),
    F("ce-unweighted", "Cross entropy is not weighted.", "loss", "4 times as large",
      b.losses(lambda found, settings: settings.mse_weight * found.mse + found.ce), ANSWERS),
    F("mse-twice", "The flow's term is there twice.", "loss", "2 times as large",
      b.losses(lambda found, settings: 2 * settings.mse_weight * found.mse + settings.ce_weight * found.ce), DRAWS),
    F("ce-dropped", "Cross entropy is left out.", "loss", "is 0",
      b.losses(lambda found, settings: settings.mse_weight * found.mse), ANSWERS),
    F("scaled-by-ranks", "Gradients are divided by two ranks once more.", "gradients", "0.5 times as large",
      b.summed(lambda found: {n: each / 2 for n, each in found.items()})),
    F("accumulated-in-bfloat16", "Gradients are added up in bfloat16.", "gradients", "bfloat16",
      b.summed(lambda found: {n: rounded(each) for n, each in found.items()})),
    F("last-sample-alone", "Each sample's gradient takes the place of the one before.", "gradients",
      "sample 2 of 2 alone",
      b.last_sample, PACK),
    F("averaged-over-samples", "Gradients are averaged over the samples.", "gradients", "0.5 times as large",
      b.summed(lambda found: {n: each / 2 for n, each in found.items()}), PACK),
    F("clipped-before-summing", "Each sample's gradient is clipped before it is added.", "gradients", "times as large",
      b.summed(lambda found: b.bounded(found))),
    F("labels-shifted", "Each label is the one before.", "label_ids", "each is the one before",
      b.sample("labels", lambda sample, labels: np.roll(labels, 1)), ANSWERS),
    F("labels-smoothed", "Labels are smoothed.", "ce", "smoothed", b.smoothed, ANSWERS),
    F("question-learned", "The mask begins a token early.", "*", "shape",
      b.early_answer, ANSWERS),
    F("target-negated", "The velocity goes from noise to data.", "mse", "negated", b.target(-1, 1), DRAWS),
    F("target-is-noise", "The noise is predicted.", "mse", "the target is the noise", b.target(1, 0), DRAWS),
    F("target-is-data", "The latents are predicted.", "mse", "the clean latents", b.target(0, 1), DRAWS),
    F("error-not-squared", "Errors count by their size.", "mse", "not squared",
      b.term(mse=lambda mse: mx.sqrt(mse + 1e-20)), DRAWS),
    F("first-row-masked", "The first latent is not learned.", "mse", "is 0",
      b.term(mse=lambda mse: mse * (mx.arange(len(mse)) > 0)[:, None]), DRAWS),
    F("times-not-shifted", "Times are not moved towards noise.", "timesteps", "not moved towards noise",
      b.shift(lambda shift: 1.0), DRAWS),
    F("times-shifted-back", "Times are moved towards data.", "timesteps", "moved towards data",
      b.shift(lambda shift: 1 / shift), DRAWS),
    F("times-swapped", "t is 0 at noise.", "timesteps", "count from noise",
      b.flow(lambda state: state._replace(timesteps=1 - state.timesteps)), DRAWS),
    F("given-frame-noised", "The given frame is noised and has the target's time.", "*", "the target's time",
      b.all_noised, GIVEN),
    F("state-not-noised", "The state is the data.", "x_t", "it is the data",
      b.flow(lambda state: state._replace(x_t=state.x_t - state.timesteps[:, None] * state.velocity)), DRAWS),
    F("caption-dropped", "The caption is dropped where it is to be kept.", "*", "shape", b.dropped_caption, DRAWS),
    F("embeddings-trained", "Frozen embeddings are learned.", "trainable parameters", "embed_tokens.* learned and is",
      b.learns(lambda learns, path: learns or "embed_tokens" in path), DRAWS),
    F("norms-frozen", "Norms are not learned.", "trainable parameters", "norm.* frozen and is",
      b.learns(lambda learns, path: learns and "norm" not in path)),
    F("eps-inside", "Epsilon is inside of the root.", "optimizer", "eps is inside",
      b.adamw(partial(b.adam, inside=True))),
    F("no-bias-correction", "The moments are not corrected for their bias.", "optimizer", "not corrected",
      b.adamw(partial(b.adam, corrected=False))),
    F("decay-in-gradient", "Decay is added to the gradient.", "optimizer", "added to the gradient", b.decayed_gradient),
    F("decay-unscaled", "Decay is not scaled by the learning rate.", "optimizer", "not scaled",
      b.adamw(lambda original, adamw, g, w, state: original(g, w, state) - w * adamw.weight_decay * (
          1 - adamw.learning_rate))),
    F("no-decay-of-vectors", "Norms and biases are not decayed.", "optimizer", "matrices alone",
      b.adamw(lambda original, adamw, g, w, state: original(g, w, state) + (
          adamw.learning_rate * adamw.weight_decay * w if w.ndim < 2 else 0))),
    F("not-clipped", "Gradients are not clipped.", "clipping", "not clipped",
      b.clipping(lambda found, bound: found)),
    F("clipped-each", "Each parameter is clipped by itself.", "clipping", "by itself",
      b.clipping(lambda found, bound: {n: each * mx.minimum(1.0, bound / mx.linalg.norm(each))
                                       for n, each in found.items()})),
    F("clipped-by-value", "Gradients are clipped element by element.", "clipping", "element by element",
      b.clipping(lambda found, bound: {n: mx.clip(each, -bound, bound) for n, each in found.items()})),
    F("warmup-a-step-ahead", "The first step is not of rate 0.", "schedule", "a step ahead", b.rate(lambda at: at + 1)),
    F("no-warmup", "The rate is there from the first step.", "schedule", "no warmup",
      b.settings(lambda settings: {"warmup": 0})),
    F("betas-exchanged", "The betas are exchanged.", "optimizer", "betas are exchanged",
      b.settings(lambda settings: {"betas": settings.betas[::-1]})),
    F("average-a-step-late", "The average takes in the parameters before the step.", "average", "the step before",
      b.averaged(lambda keep, average, before, after: keep * average + (1 - keep) * before)),
    F("average-exchanged", "The average keeps what it should take in.", "average", "exchanged",
      b.averaged(lambda keep, average, before, after: (1 - keep) * average + keep * after)),
    F("masters-rounded", "Parameters are rounded to bfloat16 after each step.", "optimizer", "rounded to bfloat16",
      b.adamw(lambda original, adamw, g, w, state: rounded(original(g, w, state)))),
]  # fmt: skip
CATALOGUE = {fault.name: fault for fault in FAULTS}
