"""What the parity engine raises for anything it cannot use."""

from collections.abc import Iterator
from contextlib import contextmanager


class ParityError(Exception):
    """Something handed to the engine is unusable; the message is one line that names it and says what to do."""


def interrupted(error: BaseException | None) -> bool:
    """Tell whether an error is an interrupt, or was raised in handling one: class creation wraps it in RuntimeError."""
    return error is not None and (
        isinstance(error, KeyboardInterrupt) or interrupted(error.__cause__ or error.__context__)
    )


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn whatever an implementation raises into a ParityError of one line; the cause stays attached."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if interrupted(error):
            raise KeyboardInterrupt from error
        # The implementations' own errors are a sentence already; of any other the kind says as much as the text.
        known = type(error).__module__.partition(".")[0] in ("lance_mlx", "reference", "parity")
        text = " ".join(str(error).split())
        raise ParityError(f"{what}: {text if known else f'{type(error).__name__}: {text}'}") from error
