"""The one exception that users see, and what it says of others."""


class LanceError(Exception):
    """Bad input or an unusable model: the message is one line that names the thing and the remedy."""


def reason(error: Exception) -> str:
    """What another exception says, in one line and without its number."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
