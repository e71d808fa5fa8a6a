"""The one exception that users are meant to see."""


class ObrError(Exception):
    """A problem told in one sentence that names the thing, the value and the remedy.

    The command line prints it without a traceback and exits with status 1.
    """
