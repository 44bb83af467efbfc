"""A port in a process of its own, with the interpreter that has its packages."""

import subprocess
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from parity.bundle.reading import Bundle
from parity.errors import ParityError, one_line
from parity.ports.channel import Channel
from parity.ports.mending import Mending
from parity.ports.observed import REQUIRED, observed_of
from parity.ports.port import Asked, Port, Progress, Weights
from parity.ports.probe import Held
from parity.tensors.recording import Observed

WORKER = Path(__file__).with_name("worker.py")


class ProcessPort(Port):
    """A port of FILE.py:NAME behind another interpreter; see Port.

    Raises ParityError for an interpreter that is none, and for whatever the port raises.
    """

    partial = True

    def __init__(self, python: Path, file: Path, name: str, spec: str, bundle: Bundle) -> None:
        self._python, self.bundle, self._ready = python, bundle, False
        self._errors = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
            )
        except OSError as error:
            reason = f"{python} cannot be run: {error.strerror}; name the Python that has the port's packages"
            raise ParityError(reason) from error
        self._channel = Channel(self._process.stdout, self._process.stdin)
        self._end = weakref.finalize(self, _end, self._process)
        told = {
            key: getattr(bundle, key) for key in ("name", "manifest", "request", "task", "entry", "dtype", "variant")
        }
        told |= {"path": str(bundle.path), "checkpoint": str(bundle.checkpoint.resolve())}
        told |= {"inputs": list(bundle.inputs), "taps": list(bundle.taps)}
        asked = {"bundle": told, "file": str(file.resolve()), "name": name, "required": REQUIRED}
        with one_line(f"{spec} cannot be loaded for bundle {bundle.name}"):
            self._ask("ready")
            self._ready = True
            found, _ = self._ask("load", asked)
        if found["lacks"]:
            lacks = " and ".join(found["lacks"])
            raise ParityError(f"{spec} has no method {lacks}: examples/README.md says what a port needs")
        self.name = found["name"] or f"{file.stem}:{name}"
        self.whole_passes = found["whole_passes"]

    def _run(self, asked: Asked) -> Observed:
        mending = asked.force if isinstance(asked.force, Mending) else None
        force = {} if mending is not None else asked.force
        exact, splits, answer = asked.sequence
        arrays = {f"force/{name}": tap.array for name, tap in force.items()}
        arrays |= {f"given/{name}": array for name, array in exact.items()}
        arrays |= {f"ids/{index}": split.ids for index, split in enumerate(splits)}
        message = {
            "names": sorted(asked.names),
            "force": {name: tap.dtype for name, tap in force.items()},
            "mend": sorted(mending or ()),
            "given": list(exact),
            "splits": [
                {key: getattr(split, key) for key in ("role", "mode", "grid", "clean_frames")} for split in splits
            ],
            "answer": answer,
        }
        if mending is not None:
            taps, absent = {}, {}
            mending.recorded = lambda: observed_of(taps, {}, absent, {}, asked.names)

            def mend(message: dict[str, Any], held: dict[str, np.ndarray]) -> None:
                new, _, lacking = _parted(message, held)
                taps.update(new)
                absent.update(lacking)
                tap = mending[message["mend"]]
                self._channel.send({"dtype": tap.dtype}, {"array": tap.array})

            self._mend = mend
        told, held = self._ask("run", message, arrays, asked.progress)
        return observed_of(*_parted(told, held), told["unknown"], asked.names)

    def _weights(self) -> Weights:
        message, arrays = self._ask("weights")
        while "end" not in message:
            yield message["weight"], arrays["array"]
            message, arrays = self._answer()

    @contextmanager
    def with_weights(self, given: Mapping[str, np.ndarray]) -> Iterator[None]:
        """See Port.with_weights; a port that loads none leaves wrong weights as they are."""
        with one_line(f"{self.name} cannot be given weights"):
            self._ask("with_weights", arrays=given)
        try:
            yield
        finally:
            self._ask("with_weights")

    def _preprocessed(self, media: Path) -> dict[str, np.ndarray] | None:
        told, arrays = self._ask("preprocessed", {"media": str(media)})
        return None if told["none"] else arrays

    def versions(self) -> dict[str, str]:
        """See Port.versions."""
        with one_line(f"{self.name} does not tell its versions"):
            return self._ask("versions")[0]["versions"]

    def _ask(
        self,
        do: str,
        message: Mapping[str, Any] | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
        progress: Progress | None = None,
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        try:
            self._channel.send({"do": do, **(message or {})}, arrays)
        except OSError as error:
            raise self._gone() from error
        return self._answer(progress)

    def _answer(self, progress: Progress | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        while True:
            try:
                message, arrays = self._channel.receive()
                if "need" in message:
                    group, name = message["need"]
                    tap = getattr(self.bundle, group)[name]
                    self._channel.send({"dtype": tap.dtype}, {"array": tap.array})
                    continue
            except (EOFError, OSError, ValueError) as error:
                raise self._gone() from error
            if "mend" in message:
                self._mend(message, arrays)
                continue
            if "progress" in message:
                if progress is not None:
                    progress(message["progress"])
                continue
            if "error" in message:
                raise ParityError(message["error"])
            return message, arrays

    def _gone(self) -> ParityError:
        self._end()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        status = self._process.returncode
        how = f"was ended by signal {-status}" if status < 0 else f"ended with {status}"
        needs = "" if self._ready else "; --python has to be a Python with NumPy and the port's packages"
        return ParityError(f"its process, {self._python}, {how}: {said}{needs}")


def _parted(
    message: Mapping[str, Any], held: Mapping[str, np.ndarray]
) -> tuple[dict[str, Held], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Taps, exact arrays and what is absent, as a worker sends them together."""
    groups: dict[str, dict[str, np.ndarray]] = {"taps": {}, "exact": {}, "absent": {}}
    for name, array in held.items():
        group, _, tap = name.partition("/")
        groups[group][tap] = array
    taps = {name: (array, message["dtypes"][name]) for name, array in groups["taps"].items()}
    return taps, groups["exact"], groups["absent"]


def _end(process: subprocess.Popen) -> None:
    """Close the pipes and end the process, which may be in the middle of something."""
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            pipe.close()
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
