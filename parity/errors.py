"""What the parity engine raises for anything it cannot use."""


class ParityError(Exception):
    """Something handed to the engine is unusable; the message is one line that names it and says what to do."""


def interrupted(error: BaseException | None) -> bool:
    """Tell whether an error is an interrupt, or was raised in handling one: class creation wraps it in RuntimeError."""
    return error is not None and (
        isinstance(error, KeyboardInterrupt) or interrupted(error.__cause__ or error.__context__)
    )
