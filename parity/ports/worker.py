"""The process of a port that brings its own packages; run as a script by the interpreter that has them.

It takes nothing of ours but three files beside it and errors.py above, which need no more than NumPy.
"""

import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


def _module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Asked(Mapping):
    """Tensors of a bundle, each asked for when it is needed."""

    def __init__(self, group: str, names: list[str], channel: Any) -> None:
        self._group, self._names, self._channel = group, names, channel

    def __getitem__(self, name: str) -> SimpleNamespace:
        if name not in self._names:
            raise KeyError(name)
        self._channel.send({"need": [self._group, name]})
        message, arrays = self._channel.receive()
        return SimpleNamespace(array=arrays["array"], dtype=message["dtype"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Mended(Mapping):
    """Forced values that the other process computes when the run comes to them, from what was recorded since."""

    def __init__(self, names: list[str], channel: Any) -> None:
        self._names, self._channel, self._known = set(names), channel, {}
        self._sent: set[str] = set()
        self.probe: Any = None

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> tuple[np.ndarray, str]:
        if name not in self._known:
            new = [tap for tap in self.probe.taps if tap not in self._sent]
            self._sent.update(new)
            message, arrays = told(self.probe, new)
            self._channel.send(message | {"mend": name}, arrays)
            message, arrays = self._channel.receive()
            self._known[name] = arrays["array"], message["dtype"]
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def told(probe: Any, names: list[str]) -> tuple[dict, dict[str, np.ndarray]]:
    """Taps of a probe as they are sent."""
    arrays = {f"taps/{name}": probe.taps[name][0] for name in names}
    arrays |= {f"absent/{name}": probe.absent[name] for name in names if name in probe.absent}
    return {"dtypes": {name: probe.taps[name][1] for name in names}}, arrays


class Worker:
    """Answers one question after the other about one port."""

    def __init__(self, channel: Any, probe: ModuleType, attached: type) -> None:
        self._channel, self._probe, self._attached = channel, probe, attached
        self._port: Any = None
        self.file: Path | None = None
        self._replaced = ExitStack()

    def ready(self, message: dict, arrays: dict) -> None:
        """Say that this is a Python that can serve."""
        self._channel.send({"done": True})

    def load(self, message: dict, arrays: dict) -> None:
        """Make the port of a file for a bundle."""
        bundle = SimpleNamespace(**message["bundle"])
        for place in ("path", "checkpoint"):
            setattr(bundle, place, Path(getattr(bundle, place)))
        for group in ("inputs", "taps"):
            setattr(bundle, group, Asked(group, getattr(bundle, group), self._channel))
        self.file = file = Path(message["file"])
        name = message["name"]
        make = vars(_module(f"_given_{file.stem}", file)).get(name)
        if not callable(make):
            raise LookupError(f"{file} defines no class or function {name!r}: name one that is given the bundle")
        self._port = make(bundle)
        lacks = [method for method in message["required"] if not callable(getattr(self._port, method, None))]
        told = {"name": getattr(self._port, "name", ""), "whole_passes": getattr(self._port, "whole_passes", False)}
        self._channel.send({"lacks": lacks, **told})

    def run(self, message: dict, arrays: dict) -> None:
        """Run it with a probe."""
        force = {name: (arrays[f"force/{name}"], dtype) for name, dtype in message["force"].items()}
        if message["mend"]:
            force = Mended(message["mend"], self._channel)
        exact = {name: arrays[f"given/{name}"] for name in message["given"]}
        splits = tuple(SimpleNamespace(**split, ids=arrays[f"ids/{i}"]) for i, split in enumerate(message["splits"]))
        probe = self._probe.Probe(
            set(message["names"]),
            force,
            exact,
            splits,
            message["answer"],
            lambda call: self._channel.send({"progress": call}),
            self._attached,
        )
        if message["mend"]:
            force.probe = probe
        self._port.run(probe)
        message, held = told(probe, list(probe.taps))
        held |= {f"exact/{name}": array for name, array in probe.exact.items()}
        held |= {f"absent/{name}": probe.absent[name] for name in probe.exact if name in probe.absent}
        self._channel.send(message | {"unknown": probe.unknown}, held)

    def weights(self, message: dict, arrays: dict) -> None:
        """Its weights, one message each."""
        for name, array in self._probe.told_weights(self._port):
            self._channel.send({"weight": name}, {"array": array})
        self._channel.send({"end": True})

    def with_weights(self, message: dict, arrays: dict) -> None:
        """Replace weights until none are given."""
        self._replaced.close()
        if arrays:
            self._replaced.enter_context(self._probe.replaced_weights(self._port, arrays))
        self._channel.send({"done": True})

    def preprocessed(self, message: dict, arrays: dict) -> None:
        """Its own way with the visuals."""
        found = getattr(self._port, "preprocessed", lambda media: None)(Path(message["media"]))
        self._channel.send({"none": found is None}, found or {})

    def versions(self, message: dict, arrays: dict) -> None:
        """What computes."""
        told = getattr(self._port, "versions", lambda: {"python": sys.version.split()[0], "numpy": np.__version__})()
        self._channel.send({"versions": told})


def follow(parent: int) -> None:
    """End this process when its parent has gone, whatever the port is doing."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Serve until the other end closes."""
    threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()
    here = Path(__file__).resolve().parent
    # What lies beside this file is not to be found under its bare name.
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != here]
    outgoing = os.fdopen(os.dup(1), "wb")
    # What the port prints goes where its errors go.
    os.dup2(2, 1)
    channel = _module("_lance_parity_channel", here / "channel.py").Channel(sys.stdin.buffer, outgoing)
    attached = _module("_lance_parity_attach", here / "attach.py").Attached
    said = _module("_lance_parity_errors", here.parent / "errors.py").said
    worker = Worker(channel, _module("_lance_parity_probe", here / "probe.py"), attached)
    while True:
        try:
            message, arrays = channel.receive()
        except EOFError:
            return
        answer: Callable[[dict, dict], None] = getattr(worker, message["do"])
        try:
            answer(message, arrays)
        except (Exception, SystemExit) as error:
            channel.send({"error": said(error, worker.file)})


if __name__ == "__main__":
    main()
