"""The one exception that users see."""


class LanceError(Exception):
    """Bad input or an unusable model: the message is one line that names the thing and the remedy."""
