"""The two kinds of mistake a user can make; scripts print them as one line and exit with `status`."""


class JaxDeltaError(Exception):
    """Input that cannot be used: a file, a checkpoint, a text. The message names the thing and the mend."""

    status = 1


class UsageError(JaxDeltaError, ValueError):
    """An option with an impossible value; the message names the option."""

    status = 2


def first_line(error: Exception) -> str:
    """What another library's exception says, cut to one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
