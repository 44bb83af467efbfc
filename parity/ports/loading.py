"""Ports by name, or from a file of the user's."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from parity.bundle.reading import Bundle
from parity.errors import ParityError, one_line
from parity.model import definition
from parity.ports.attach import Attached
from parity.ports.mending import Mending
from parity.ports.observed import REQUIRED, HeldTaps, observed_of
from parity.ports.port import Asked, Loader, Port, Weights, versions
from parity.ports.probe import Probe, replaced_weights, told_weights
from parity.ports.process import ProcessPort
from parity.python_file import import_file
from parity.tensors.recording import Observed


def known_ports() -> dict[str, Loader]:
    """The ports that the definition of the model brings, by name."""
    return definition().PORTS


def port_loader(spec: str, python: Path | None = None) -> Loader:
    """The loader of a port: a known name, or FILE.py:NAME, a class or function that is given the bundle.

    With `python`, the path of an interpreter, FILE is loaded by that one, in a process of its own. Raises ParityError
    where there is no such port, file or name.
    """
    path, colon, name = spec.rpartition(":")
    if colon and path.endswith(".py"):
        return _from_file(Path(path), name, spec, python)
    if python is not None:
        raise ParityError(f"--python is for a port from a file: give --impl FILE.py:NAME, not {spec}")
    if spec not in (known := known_ports()):
        raise ParityError(f"there is no implementation {spec!r}: name {', '.join(known)}, or FILE.py:NAME")
    return known[spec]


def _from_file(path: Path, name: str, spec: str, python: Path | None) -> Loader:
    if python is not None:
        if not path.is_file():
            raise ParityError(f"there is no Python file {path}: name a .py file with a port, as FILE.py:NAME")
        return lambda bundle: ProcessPort(python, path, name, spec, bundle)
    make = vars(import_file(path, "a port, as FILE.py:NAME")).get(name)
    if not callable(make):
        raise ParityError(f"{path} defines no class or function {name!r}: name one that is given the bundle")

    def load(bundle: Bundle) -> Port:
        with one_line(f"{spec} cannot be loaded for bundle {bundle.name}", path), redirect_stdout(sys.stderr):
            port = make(bundle)
        if lacks := [method for method in REQUIRED if not callable(getattr(port, method, None))]:
            raise ParityError(f"{spec} has no method {' and '.join(lacks)}: examples/README.md says what a port needs")
        return GivenPort(port, f"{path.stem}:{name}", bundle, path)

    return load


class GivenPort(Port):
    """A port of the user's: what it leaves out has a default."""

    partial = True

    def __init__(self, port: Any, name: str, bundle: Bundle, file: Path) -> None:
        self._port, self.bundle, self.file = port, bundle, file
        self.name = getattr(port, "name", name)
        self.whole_passes = getattr(port, "whole_passes", False)

    @property
    def given(self) -> Any:
        """What the file's class or function made."""
        return self._port

    def _run(self, asked: Asked) -> Observed:
        probe = Probe(asked.names, HeldTaps(asked.force), *asked.sequence, asked.progress, Attached)
        if isinstance(asked.force, Mending):
            asked.force.recorded = lambda: observed_of(probe.taps, {}, probe.absent, {}, asked.names)
        with redirect_stdout(sys.stderr):
            self._port.run(probe)
        return observed_of(probe.taps, probe.exact, probe.absent, probe.unknown, asked.names)

    def _weights(self) -> Weights:
        yield from told_weights(self._port)

    @contextmanager
    def with_weights(self, given: Mapping[str, np.ndarray]) -> Iterator[None]:
        """See Port.with_weights; a port that loads none leaves wrong weights as they are."""
        with ExitStack() as stack:
            with one_line(f"{self.name} cannot be given weights", self.file):
                stack.enter_context(replaced_weights(self._port, given))
            yield

    def _preprocessed(self, media: Path) -> dict[str, np.ndarray] | None:
        return getattr(self._port, "preprocessed", lambda media: None)(media)

    def versions(self) -> dict[str, str]:
        """See Port.versions."""
        return getattr(self._port, "versions", versions)()
