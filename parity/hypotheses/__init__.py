"""Hypotheses: what a port may do instead of what upstream does, tried at the first wrong tap."""

from parity.hypotheses.base import (
    DoesNotApply,
    Hypothesis,
    attempt,
    check_unique,
    load_hypotheses,
    nothing,
    same,
    unpatched,
)

__all__ = [
    "DoesNotApply",
    "Hypothesis",
    "attempt",
    "check_unique",
    "load_hypotheses",
    "nothing",
    "same",
    "unpatched",
]
