"""What can be compared: a port of a model, with a bundle's checkpoint and request loaded."""

import importlib.metadata
import platform
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parity.bundle.reading import Bundle
from parity.errors import one_line
from parity.tensors.recording import ExactInputs, Observed, Tap

Progress = Callable[[str], None]
Weights = Iterator[tuple[str, np.ndarray]]


@dataclass(frozen=True)
class Asked:
    """What a run is asked; see Port.run."""

    names: Container[str]
    force: Mapping[str, Tap]
    exact: ExactInputs | None
    progress: Progress

    @property
    def sequence(self) -> tuple[Mapping[str, np.ndarray], tuple[Any, ...], int | None]:
        """The exact values to go on with, the splits and the answer's place; nothing of a run that goes its own way."""
        exact = self.exact
        return ({}, (), None) if exact is None else (exact.arrays, exact.splits, exact.answer)


class Port:
    """Something that computes what a model does, loaded for one bundle; whatever it raises ends in one line.

    Attributes:
        name: what reports call it.
        partial: whether it may lack parts: what it does not compute is told, and is no finding.
        whole_passes: whether it runs a full-sequence entry in passes over all tokens, and has to be given those.
        bundle: what it is loaded for.
        file: of the user's, whose lines are named in errors; None where there is none.
    """

    name: str
    partial: bool = False
    whole_passes: bool = False
    bundle: Bundle
    file: Path | None = None

    def run(
        self,
        names: Container[str],
        force: Mapping[str, Tap] | None = None,
        exact: ExactInputs | None = None,
        progress: Progress | None = None,
    ) -> Observed:
        """Replay the request from the bundle's randomness and visuals, under its numerics.

        Args:
            names: the taps to record; others may be left out.
            force: values to go on with in the place of what is computed at these taps, once that was recorded.
            exact: integers and times to go on with in the place of what is computed.
            progress: told the name of each call before it runs.
        """
        with one_line(f"{self.name} cannot run bundle {self.bundle.name}", self.file):
            return self._run(Asked(names, {} if force is None else force, exact, progress or (lambda call: None)))

    def weights(self) -> Weights:
        """The parameters that it uses, float32, under the checkpoint's names and in the checkpoint's layout."""
        with one_line(f"{self.name} does not tell its weights", self.file):
            yield from self._weights()

    def with_weights(self, given: Mapping[str, np.ndarray]) -> AbstractContextManager[None]:
        """A context in which these parameters hold the given values, as far as they can be replaced."""
        return nullcontext()

    def preprocessed(self, media: Path) -> dict[str, np.ndarray] | None:
        """The visuals as it resizes them itself, by the names of the bundle's inputs; None where it has no part.

        The paths of the request's visuals start from `media`.
        """
        with one_line(f"{self.name} cannot prepare the visuals of bundle {self.bundle.name}", self.file):
            return self._preprocessed(media)

    def versions(self) -> dict[str, str]:
        """Names and versions of what computes."""
        return versions()

    def _run(self, asked: Asked) -> Observed:
        raise NotImplementedError

    def _weights(self) -> Weights:
        raise NotImplementedError

    def _preprocessed(self, media: Path) -> dict[str, np.ndarray] | None:
        return None


Loader = Callable[[Bundle], Port]
"""Loads a port for a bundle; raises ParityError where it cannot run it."""


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, NumPy and the named packages."""
    found = {"python": platform.python_version(), "numpy": np.__version__}
    return found | {package: importlib.metadata.version(package) for package in packages}
