"""The one exception that users see, and what it says of others."""


class LanceError(Exception):
    """Bad input or an unusable model: the message is one line that names the thing and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str, most: int = 1000) -> str:
    """A text in one line: what would steer a terminal is escaped, and the middle of a longer one than `most` is out."""
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return line if len(line) <= most else f"{line[: most * 2 // 3]} ... {line[-most // 4 :]}"


def reason(error: Exception) -> str:
    """What another exception says, in one line and without its number."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
