"""The one exception that users are meant to see, and those that a broken file raises."""

from safetensors import SafetensorError


class ObrError(Exception):
    """A problem told in one sentence that names the thing, the value and the remedy.

    The command line prints it without a traceback and exits with status 1.
    """


# What reading a safetensors file, or the metadata that ought to be in it, raises when it is not whole.
BROKEN_FILE = (OSError, SafetensorError, KeyError, TypeError, ValueError)


def first_line(error: BaseException) -> str:
    """What an exception says, short enough to stand inside a sentence."""
    return str(error).strip().split("\n")[0].rstrip(".: ")[:200]
