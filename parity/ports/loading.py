"""Ports by name, or from a file of the user's."""

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from parity.bundle.reading import Bundle
from parity.errors import ParityError, one_line
from parity.model import definition
from parity.ports.port import Loader, Port, Progress, Weights, versions
from parity.python_file import import_file
from parity.tensors.arrays import tap_of
from parity.tensors.recording import Contract, Observed, Recording, Tap

REQUIRED = ("run", "weights")
"""What a port from a file has to have; of the rest there are defaults."""


def known_ports() -> dict[str, Loader]:
    """The ports that the definition of the model brings, by name."""
    return definition().PORTS


def port_loader(spec: str) -> Loader:
    """The loader of a port: a known name, or FILE.py:NAME, a class or function that is given the bundle.

    Raises ParityError where there is no such port, file or name.
    """
    path, colon, name = spec.rpartition(":")
    if colon and path.endswith(".py"):
        return _from_file(Path(path), name, spec)
    if spec not in (known := known_ports()):
        raise ParityError(f"there is no implementation {spec!r}: name {', '.join(known)}, or FILE.py:NAME")
    return known[spec]


def _from_file(path: Path, name: str, spec: str) -> Loader:
    make = vars(import_file(path, "a port, as FILE.py:NAME")).get(name)
    if not callable(make):
        raise ParityError(f"{path} defines no class or function {name!r}: name one that is given the bundle")

    def load(bundle: Bundle) -> Port:
        with one_line(f"{spec} cannot be loaded for bundle {bundle.name}"):
            port = make(bundle)
        if lacks := [method for method in REQUIRED if not callable(getattr(port, method, None))]:
            raise ParityError(f"{spec} makes something without {' and '.join(lacks)}: see parity.ports.port.Port")
        return GivenPort(port, f"{path.stem}:{name}", bundle.name)

    return load


class GivenPort:
    """A port of the user's: what it leaves out has a default, what it raises is one line, arrays become taps."""

    def __init__(self, port: Any, name: str, bundle: str) -> None:
        self._port, self._bundle = port, bundle
        self.name: str = getattr(port, "name", name)
        self.whole_passes: bool = getattr(port, "whole_passes", False)

    def run(
        self,
        names: Container[str],
        force: Mapping[str, Tap] | None = None,
        contract: Contract | None = None,
        progress: Progress | None = None,
    ) -> Observed:
        """See Port.run; a mapping of names to arrays will do for what is observed."""
        with one_line(f"{self.name} cannot run bundle {self._bundle}"):
            found = self._port.run(names, force=force or {}, contract=contract, progress=progress)
            if isinstance(found, Observed):
                return found
            taps: Recording = {name: tap_of(value, name) for name, value in found.items()}
        exact = {name: tap for name, tap in taps.items() if name.startswith("inputs/")}
        return Observed({name: tap for name, tap in taps.items() if name not in exact and name in names}, exact, {})

    def weights(self) -> Weights:
        """See Port.weights."""
        with one_line(f"{self.name} does not tell its weights"):
            yield from self._port.weights()

    @contextmanager
    def with_weights(self, given: Mapping[str, np.ndarray]) -> Iterator[None]:
        """See Port.with_weights; without it wrong weights stay as they are."""
        with getattr(self._port, "with_weights", lambda given: nullcontext())(given):
            yield

    def preprocessed(self, media: Path) -> dict[str, np.ndarray] | None:
        """See Port.preprocessed."""
        with one_line(f"{self.name} cannot prepare the visuals of bundle {self._bundle}"):
            return getattr(self._port, "preprocessed", lambda media: None)(media)

    def versions(self) -> dict[str, str]:
        """See Port.versions."""
        return getattr(self._port, "versions", versions)()
