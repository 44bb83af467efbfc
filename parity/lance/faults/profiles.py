"""Whole implementations as sets of faults: what one computes differently from upstream, difference by difference."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from parity.bundle.reading import Bundle
from parity.lance.faults.base import ASKS, EDITS, LOOKS, Fault
from parity.lance.faults.loading import CATALOGUE


@dataclass(frozen=True)
class Profile:
    """An implementation that departs from upstream.

    Attributes:
        name: how it is named on the command line.
        about: one sentence: which implementation, and as of when.
        departures: the faults of each departure, by its number in the list that describes them.
    """

    name: str
    about: str
    departures: Mapping[int, tuple[Fault, ...]]

    def faults(self, task: str, dtype: str, entry: str) -> list[Fault]:
        """The faults that touch such a run, in the order in which they are applied."""
        return [fault for group in self.departures.values() for fault in group if fault.touches(task, dtype, entry)]

    def faults_of(self, bundle: Bundle) -> list[Fault]:
        """Those of them that show in a bundle's run."""
        return [fault for group in self.departures.values() for fault in group if fault.suits(bundle)]


_DRAWS = frozenset({"t2i", "t2v", "image_edit", "video_edit"})
"""What the implementation draws: it has no image to video, so that nothing else can be said of that."""


def _in(tasks: frozenset[str], *names: str) -> tuple[Fault, ...]:
    """Faults of the catalogue as they show in some of their tasks."""
    return tuple(replace(CATALOGUE[name], tasks=CATALOGUE[name].tasks & tasks) for name in names)


_SINCE = {
    1: _in(frozenset({"t2i", "image_edit"}), "vae-first-frame-through-time-conv-first-kept"),
    2: _in(frozenset({"t2v"}), "temporal-stride-1"),
    3: _in(frozenset({"t2v"}), "grid-origin-0", "closing-bracket-restarts"),
    4: _in(frozenset({"t2i"}), "target-cells-anchored-1000"),
    5: _in(EDITS, "temporal-stride-1", "source-and-target-anchored-1000"),
    6: _in(EDITS, "vit-block-missing"),
    7: _in(_DRAWS, "brackets-hidden-from-latents"),
    8: _in(ASKS, "vit-block-causal"),
    9: _in(ASKS, "temporal-stride-1"),
    10: _in(_DRAWS, "guidance-at-every-step"),
    11: _in(_DRAWS, "renorm-channel"),
    12: _in(_DRAWS, "unconditional-prefix-recomputed"),
    13: _in(_DRAWS, "euler-float32-state"),
    14: _in(_DRAWS | ASKS, "rope-frequencies-exact"),
    15: _in(EDITS, "encoder-takes-the-mean"),
    16: _in(EDITS, "ascii-apostrophe"),
    17: _in(_DRAWS, "pixels-truncated"),
    18: _in(LOOKS, "visuals-stretched"),
    19: _in(frozenset({"i2v"}), "i2v-missing"),
    20: _in(_DRAWS, "closing-im-end-missing"),
    # What its float32 norms and states raise to float32 where upstream rounds.
    21: _in(
        _DRAWS,
        "residual-in-float32",
        "queries-float32-in-text",
        "embeddings-summed-in-float32",
        "vae-statistics-not-rounded",
    ),
}
_BEFORE = {
    # The causal block hides all that hidden brackets do.
    7: _in(_DRAWS - {"t2v"}, "brackets-hidden-from-latents"),
    22: (
        *_in(frozenset({"t2v"}), "target-anchored-2000", "empty-prompt-guidance", "noise-block-causal"),
        *_in(ASKS, "head-tied"),
    ),
}

PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "xocialize-lance-mlx",
            "xocialize/lance-mlx at d39a981 (2026-05-29): 21 departures, as far as lance_mlx can be made to have "
            "them; examples/xocialize_lance_mlx.py looks at the port itself.",
            _SINCE,
        ),
        Profile("xocialize-lance-mlx-earlier", "Its releases before: the same and more.", _SINCE | _BEFORE),
    )
}
