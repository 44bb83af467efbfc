"""Laws by kind of component: what it computes instead, read from recorded inputs and outputs."""

import numpy as np

from parity.laws import (
    activation,
    attention,
    borders,
    convolution,
    edits,
    guidance,
    kernel,
    linear,
    modulation,
    narrow,
    neighbours,
    norm,
    pixel_curve,
    place,
    preprocess,
    rearrangement,
    rotary,
    sampling,
    schedule,
    sequence,
    sinusoidal,
    statistics,
    sums,
    table,
    waves,
    weight,
)
from parity.laws.base import Component, Curves, Figure, Fitter, Law, Matrices

__all__ = ["Component", "Curves", "Figure", "Fitter", "Law", "Matrices", "ANY", "ANY_KIND", "LAWS", "fitted"]

LAWS: dict[str, tuple[Fitter, ...]] = {
    "linear": (linear.read, attention.attention),
    "attention": (attention.attention,),
    "rotary": (rotary.rotary,),
    "convolution": (narrow.convolution, statistics.brought_back, convolution.variants, *kernel.FITTERS),
    "pixel_curve": (*pixel_curve.FITTERS, *neighbours.FITTERS),
    "guidance": (guidance.guidance,),
    "guided": (schedule.guided,),
    "euler": (sampling.euler,),
    "schedule": (schedule.schedule,),
    "times": (schedule.of_latents,),
    "tokens": (edits.edited, borders.bordered, sequence.elementwise),
    "integers": (sequence.elementwise,),
    "preprocess": (preprocess.preprocess,),
    "embedding": (table.embedding, sampling.sum_of_parts),
    "sinusoids": (waves.sinusoids, sampling.sum_of_parts),
    "time": (
        waves.waves_through_layers,
        activation.read,
        sampling.sum_of_parts,
    ),
    "array": (narrow.added, sampling.sum_of_parts),
    "normalised": (statistics.normalised, sampling.sum_of_parts),
    "weight": (weight.changed,),
    "norm": (narrow.norm, norm.read),
    "gated": (activation.read,),
    "sum": (sums.read,),
    "modulated": (modulation.read,),
    "waves": (sinusoidal.read,),
    "rearranged": (rearrangement.read,),
}
"""The fitters of each kind of component."""
ANY: tuple[Fitter, ...] = (place.place,)
"""The fitters that are tried of every kind."""
ANY_KIND = "any"
"""The kind of what is known by its result alone."""


def fitted(component: Component, got: np.ndarray) -> list[Law]:
    """The laws that the fitters of a component's kind read from what was computed in its place."""
    fitters = (*LAWS.get(component.kind, ()), *ANY)
    found: dict[str, Law] = {}
    # What has no value is no law.
    with np.errstate(all="ignore"):
        for law in (law for fitter in fitters for law in fitter(component, got)):
            found.setdefault(law.sentence, law)
    return list(found.values())
