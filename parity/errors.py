"""The error that the parity engine raises for anything it cannot use."""


class ParityError(Exception):
    """Something handed to the engine is unusable; the message is one line that names it and says what to do."""
