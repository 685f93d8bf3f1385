"""What goes wrong, in a sentence."""


class UserError(Exception):
    """A problem that the user can solve, in one plain sentence. The scripts print it to stderr
    without a traceback, and exit with status 1."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class if it has none."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0]
