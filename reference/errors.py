"""The one exception that the reference raises for bad input."""


class ReferenceError(Exception):
    """Bad input or a bad checkpoint; the message is one line naming the thing and the remedy."""
