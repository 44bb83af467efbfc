"""Where both commands begin: a signal that comes while their libraries are imported ends them with a line as well.

Half-imported libraries make anything of an exception, so that one is not raised before all is there.
"""

import os
import signal
from importlib import import_module
from typing import NoReturn

_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


def lance_mlx() -> None:
    """Run `lance-mlx`."""
    _run("lance-mlx", "lance_mlx.cli.main")


def lance_parity() -> None:
    """Run `lance-parity`."""
    _run("lance-parity", "parity.cli.main")


def _run(name: str, module: str) -> None:
    def leave(number: int, _: object) -> NoReturn:
        os.write(2, f"{name}: interrupted, nothing written\n".encode())
        os._exit(128 + number)

    # A process that is to ignore one, as a background job Ctrl-C, goes on doing so.
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: old for number, old in before.items() if old in (signal.SIG_DFL, signal.default_int_handler)}
    for number in before:
        signal.signal(number, leave)
    main = import_module(module).main
    for number, old in before.items():
        signal.signal(number, old)
    main()
