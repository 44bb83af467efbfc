"""Gradients of a pack, and what an optimizer makes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from lance_mlx.model.lance import Lance
from lance_mlx.training.loss import Losses, LossSettings, Totals, losses_of, terms
from lance_mlx.training.pack import Draw, Sample

Arrays = dict[str, mx.array]
"""Arrays by the names of the checkpoint's parameters."""


def gradients(
    model: Lance,
    samples: Sequence[Sample],
    draws: Sequence[Draw | None],
    settings: LossSettings,
    vocabulary: int,
    totals: Totals | None = None,
) -> tuple[Losses, Arrays]:
    """The losses of a pack, and the gradient of the whole for every parameter that is not frozen, float32 by name.

    One sample is run at a time, so that a pack needs no more memory than its longest sample.

    Args:
        vocabulary: as for `terms`.
        totals: those of all that is summed before a step; the pack's own when None.
    """
    totals = totals or Totals.of(samples, settings)

    def share(sample: Sample, drawn: Draw | None) -> Losses:
        return losses_of(terms(model, sample, drawn, settings.timestep_shift, vocabulary), sample, totals, settings)

    run = nn.value_and_grad(model, share)
    losses, summed = Losses(*(mx.array(0.0),) * 3), {}
    for sample, drawn in zip(samples, draws, strict=True):
        values, own = run(sample, drawn)
        losses = losses + Losses(*values)
        for name, gradient in tree_flatten(own):
            wide = gradient.astype(mx.float32)
            summed[name] = summed[name] + wide if name in summed else wide
        mx.eval(losses, summed)
    return losses, summed


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with a linear warmup from 0; the defaults are those of upstream's scripts.

    Attributes:
        warmup: steps until the rate is reached; the first of them changes nothing.
        max_grad_norm: gradients that are longer together are scaled down to it.
        ema: share of the averaged parameters that a step keeps; None for no average.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-15
    weight_decay: float = 0.0
    warmup: int = 500
    max_grad_norm: float = 1.0
    ema: float | None = None

    def rate(self, step: mx.array) -> mx.array:
        """The learning rate of a step, from 0 (transformers' get_constant_schedule_with_warmup)."""
        if not self.warmup:
            return mx.array(self.learning_rate)
        return self.learning_rate * mx.minimum(step.astype(mx.float32) / self.warmup, 1.0)


class Optimizer:
    """Steps float32 masters of a model's parameters, which are rounded into the model after each.

    They begin as the `parameters` that are given, which may be what the model's were before they were rounded.

    Attributes:
        masters: float32, by name.
        average: their moving average, empty without one.
    """

    def __init__(self, settings: OptimizerSettings, parameters: Mapping[str, mx.array]) -> None:
        self._settings = settings
        options = list(settings.betas), settings.eps, settings.weight_decay
        self._adamw = optim.AdamW(settings.rate, *options, bias_correction=True)
        self.masters = {name: array.astype(mx.float32) for name, array in parameters.items()}
        self.average = dict(self.masters) if settings.ema is not None else {}
        self._adamw.init(self.masters)

    @property
    def steps(self) -> int:
        """How many steps have been made."""
        return int(self._adamw.step.item())

    def step(self, model: nn.Module, gradients: Mapping[str, mx.array]) -> mx.array:
        """Make a step and round the masters into the model; returns the norm of all gradients before it is clipped."""
        clipped, norm = optim.clip_grad_norm(dict(gradients), self._settings.max_grad_norm)
        self.masters = self._adamw.apply_gradients(clipped, self.masters)
        keep = self._settings.ema
        if keep is not None:
            self.average = {n: keep * self.average[n] + (1 - keep) * each for n, each in self.masters.items()}
        self._round_into(model)
        mx.eval(self.masters, self.average, self._adamw.state, norm)
        return norm

    def state(self) -> Arrays:
        """All that is needed to go on, float32 by name; the number of steps as "step", int32 []."""
        kept = {"step": mx.array(self.steps, mx.int32)}
        for name, master in self.masters.items():
            moments = self._adamw.state[name]
            kept |= {f"master.{name}": master, f"m.{name}": moments["m"], f"v.{name}": moments["v"]}
            if self.average:
                kept[f"average.{name}"] = self.average[name]
        return kept

    def restore(self, model: nn.Module, kept: Mapping[str, mx.array]) -> None:
        """Go on from what `state` gave for the same parameters; raises KeyError where it is of others."""
        self.masters = {name: kept[f"master.{name}"] for name in self.masters}
        self.average = {name: kept[f"average.{name}"] for name in self.average}
        moments = {name: {"m": kept[f"m.{name}"], "v": kept[f"v.{name}"]} for name in self.masters}
        self._adamw.state["step"] = kept["step"].astype(mx.uint64)
        self._adamw.state.update(moments)
        self._round_into(model)

    def _round_into(self, model: nn.Module) -> None:
        dtypes = {name: array.dtype for name, array in tree_flatten(model.parameters())}
        model.load_weights([(name, each.astype(dtypes[name])) for name, each in self.masters.items()], strict=False)
