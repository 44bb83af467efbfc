"""A port in a process of its own, with the interpreter that has its packages."""

import subprocess
import tempfile
import weakref
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from parity.bundle.reading import Bundle
from parity.errors import ParityError, one_line
from parity.ports.channel import Channel
from parity.ports.mending import Mending
from parity.ports.observed import REQUIRED, observed_of, told_weights
from parity.ports.port import Progress, Weights
from parity.ports.probe import Held
from parity.tensors.recording import Contract, Observed, Tap

WORKER = Path(__file__).with_name("worker.py")


class ProcessPort:
    """A port of FILE.py:NAME behind another interpreter; see Port.

    Raises ParityError for an interpreter that is none, and for whatever the port raises.
    """

    partial = True

    def __init__(self, python: Path, file: Path, name: str, spec: str, bundle: Bundle) -> None:
        self._python, self._bundle, self._ready = python, bundle, False
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
        self._ask_ready(f"{spec} cannot be loaded for bundle {bundle.name}")
        found, _ = self._ask(f"{spec} cannot be loaded for bundle {bundle.name}", "load", asked)
        if found["lacks"]:
            lacks = " and ".join(found["lacks"])
            raise ParityError(f"{spec} has no method {lacks}: examples/README.md says what a port needs")
        self.name: str = found["name"] or f"{file.stem}:{name}"
        self.whole_passes: bool = found["whole_passes"]

    def _ask_ready(self, what: str) -> None:
        """See that the worker is there."""
        self._ask(what, "ready", {})
        self._ready = True

    def run(
        self,
        names: Container[str],
        force: Mapping[str, Tap] | None = None,
        contract: Contract | None = None,
        progress: Progress | None = None,
    ) -> Observed:
        """See Port.run."""
        mending = force if isinstance(force, Mending) else None
        force = {} if mending is not None else force or {}
        arrays = {f"force/{name}": tap.array for name, tap in force.items()}
        splits, exact = [], {}
        if contract is not None:
            exact = contract.exact
            arrays |= {f"contract/{name}": array for name, array in exact.items()}
            for index, split in enumerate(contract.splits):
                arrays[f"ids/{index}"] = split.ids
                splits.append({"role": split.role, "mode": split.mode, "grid": split.grid,
                               "clean_frames": split.clean_frames})  # fmt: skip
        asked = {
            "names": sorted(names),
            "force": {name: tap.dtype for name, tap in force.items()},
            "mend": sorted(mending or ()),
            "contract": list(exact),
            "splits": splits,
            "answer": contract and contract.answer,
        }
        what = f"{self.name} cannot run bundle {self._bundle.name}"
        if mending is not None:
            taps, absent = {}, {}
            mending.recorded = lambda: observed_of(taps, {}, absent, (), names, what)

            def mend(message: dict[str, Any], held: dict[str, np.ndarray]) -> None:
                new, _, lacking = _parted(message, held)
                taps.update(new)
                absent.update(lacking)
                tap = mending[message["mend"]]
                self._channel.send({"dtype": tap.dtype}, {"array": tap.array})

            self._mend = mend
        told, held = self._ask(what, "run", asked, arrays, progress)
        return observed_of(*_parted(told, held), told["unknown"], names, what)

    def weights(self) -> Weights:
        """See Port.weights."""
        what = f"{self.name} does not tell its weights"
        with one_line(what):
            yield from told_weights(self._weights(what))

    def _weights(self, what: str) -> Weights:
        message, arrays = self._ask(what, "weights", {})
        while "end" not in message:
            yield message["weight"], arrays["array"]
            message, arrays = self._answer(what)

    @contextmanager
    def with_weights(self, given: Mapping[str, np.ndarray]) -> Iterator[None]:
        """See Port.with_weights; a port without it leaves wrong weights as they are."""
        what = f"{self.name} cannot be given weights"
        self._ask(what, "with_weights", {}, given)
        try:
            yield
        finally:
            self._ask(what, "with_weights", {})

    def preprocessed(self, media: Path) -> dict[str, np.ndarray] | None:
        """See Port.preprocessed."""
        what = f"{self.name} cannot prepare the visuals of bundle {self._bundle.name}"
        told, arrays = self._ask(what, "preprocessed", {"media": str(media)})
        return None if told["none"] else arrays

    def versions(self) -> dict[str, str]:
        """See Port.versions."""
        return self._ask(f"{self.name} does not tell its versions", "versions", {})[0]["versions"]

    def _ask(
        self,
        what: str,
        do: str,
        message: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray] | None = None,
        progress: Progress | None = None,
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        try:
            self._channel.send({"do": do, **message}, arrays)
        except OSError as error:
            raise self._gone(what) from error
        return self._answer(what, progress)

    def _answer(self, what: str, progress: Progress | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        while True:
            try:
                message, arrays = self._channel.receive()
                if "need" in message:
                    group, name = message["need"]
                    tap = getattr(self._bundle, group)[name]
                    self._channel.send({"dtype": tap.dtype}, {"array": tap.array})
                    continue
            except (EOFError, OSError, ValueError) as error:
                raise self._gone(what) from error
            if "mend" in message:
                self._mend(message, arrays)
                continue
            if "progress" in message:
                if progress is not None:
                    progress(message["progress"])
                continue
            if "error" in message:
                raise ParityError(f"{what}: {message['error']}")
            return message, arrays

    def _gone(self, what: str) -> ParityError:
        self._end()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        status = self._process.returncode
        how = f"was ended by signal {-status}" if status < 0 else f"ended with {status}"
        needs = "" if self._ready else "; --python has to be a Python with NumPy and the port's packages"
        return ParityError(f"{what}: its process, {self._python}, {how}: {said}{needs}")


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
