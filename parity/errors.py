"""What the parity engine raises for anything it cannot use; needs nothing but Python."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def printable(text: str, most: int = 1000) -> str:
    """A text in one line: what would steer a terminal is escaped, and the middle of a longer one than `most` is out."""
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return line if len(line) <= most else f"{line[: most * 2 // 3]} ... {line[-most // 4 :]}"


class ParityError(Exception):
    """Something handed to the engine is unusable; the message is one line that names it and says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class FloorsRefused(ParityError):
    """What is kept beside a bundle of how far rounding goes cannot be used."""


def interrupted(error: BaseException | None) -> bool:
    """Tell whether an error is an interrupt, or was raised in handling one: class creation wraps it in RuntimeError."""
    return error is not None and (
        isinstance(error, KeyboardInterrupt) or interrupted(error.__cause__ or error.__context__)
    )


def said(error: BaseException, file: Path | None = None) -> str:
    """An error in one line: its kind, its text, and which line of `file` it came through last."""
    # The implementations' own errors are a sentence already; of any other the kind says as much as the text.
    known = type(error).__module__.partition(".")[0] in ("lance_mlx", "reference", "parity")
    text = " ".join(str(error).split())
    whole = text if known else f"{type(error).__name__}: {text}".removesuffix(": ")
    frames = traceback.extract_tb(error.__traceback__) if file else []
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file.resolve()]
    return f"{whole} ({file.name}:{lines[-1]})" if lines else whole


@contextmanager
def one_line(what: str, file: Path | None = None) -> Iterator[None]:
    """Turn whatever an implementation raises into a ParityError of one line; the cause stays attached; see said."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if interrupted(error):
            raise KeyboardInterrupt from error
        raise ParityError(f"{what}: {said(error, file)}") from error
