"""Where both commands begin, and what a signal does to them: a line, and a status of 128 and its number."""

import os
import signal
import sys
from importlib import import_module

_BY_SIGNAL = 128
"""Of a shell's status for what a signal ended."""
_A_MOMENT = 0.01


def lance_mlx() -> None:
    """Run `lance-mlx`."""
    with Importing("lance-mlx"):
        main = import_module("lance_mlx.cli.main").main
    main()


def lance_parity() -> None:
    """Run `lance-parity`."""
    with Importing("lance-parity"):
        main = import_module("parity.cli.main").main
    main()


class Importing:
    """While libraries are imported a signal ends the process at once: they would make anything of an exception."""

    def __init__(self, command: str) -> None:
        self._line = f"{command}: interrupted, nothing written\n".encode()

    def __enter__(self) -> None:
        # A process that is to ignore one, as a background job Ctrl-C, goes on doing so.
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        self._before = {number: old for number, old in handlers.items() if old not in (signal.SIG_IGN, None)}
        for number in self._before:
            signal.signal(number, self._leave)

    def __exit__(self, *_: object) -> None:
        _restore(self._before)

    def _leave(self, number: int, _: object) -> None:
        os.write(2, self._line)
        os._exit(_BY_SIGNAL + number)


class Interrupts:
    """Meanwhile what tells a process to end raises KeyboardInterrupt as Ctrl-C does, so that it cleans up."""

    def __enter__(self) -> "Interrupts":
        self._caught, self._hook, sys.unraisablehook = signal.SIGINT, sys.unraisablehook, self._unraised
        # Python's own handler of Ctrl-C, which does the same, is known to asyncio.
        taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
        self._before = {number: signal.signal(number, self._interrupt) for number in taken}
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._hook
        _restore(self._before)

    @property
    def status(self) -> int:
        """What an interrupted process ends with."""
        return _BY_SIGNAL + self._caught

    def _interrupt(self, number: int, _: object) -> None:
        if number != signal.SIGALRM:
            self._caught = number
        raise KeyboardInterrupt

    def _unraised(self, error: "sys.UnraisableHookArgs") -> None:
        """What a finalizer kept to itself, an interrupt among it, which is raised again once that is done."""
        if not isinstance(error.exc_value, KeyboardInterrupt):
            self._hook(error)
            return
        self._before.setdefault(signal.SIGALRM, signal.signal(signal.SIGALRM, self._interrupt))
        signal.setitimer(signal.ITIMER_REAL, _A_MOMENT)


def _restore(handlers: dict[signal.Signals, object]) -> None:
    for number, old in handlers.items():
        signal.signal(number, old)
