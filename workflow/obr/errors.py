"""The one exception that users are meant to see, and those that a broken file raises."""

from safetensors import SafetensorError


class ObrError(Exception):
    """A problem in one sentence that names the thing, the value and the remedy.

    The command line prints it without a traceback and exits with status 1. What a file has put into it, line ends
    and a terminal's control characters among it, is written out, and cut where it is too long.
    """

    def __init__(self, sentence: str):
        super().__init__(printable(sentence))


LONGEST = 1800  # characters of a sentence


def printable(text: str) -> str:
    """Text on one line: characters that cannot be printed as Python writes them, a long text without its middle."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


# What reading a safetensors file, or the metadata that ought to be in it, raises when it is not whole.
BROKEN_FILE = (OSError, SafetensorError, KeyError, TypeError, ValueError)


def first_line(error: BaseException) -> str:
    """What an exception says, short enough to stand inside a sentence.

    Example:
        >>> first_line(ValueError("not a number.\\n  in line 3"))
        'not a number'
    """
    return str(error).strip().split("\n")[0].rstrip(".: ")[:200]
