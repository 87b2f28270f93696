"""The two kinds of mistake a user can make; scripts print them as one line and exit with `status`."""

import contextlib
from collections.abc import Iterator


class JaxDeltaError(Exception):
    """Input that cannot be used: a file, a checkpoint, a text. The message names the thing and the mend."""

    status = 1


class UsageError(JaxDeltaError, ValueError):
    """An option with an impossible value; the message names the option."""

    status = 2


@contextlib.contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Around the import of what an extra of the package brings.

    Raises:
        JaxDeltaError: it is not installed; the message says that `what` needs it, and how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise JaxDeltaError(
            f"{what} needs {package}, which is not installed (pip install 'jaxdelta[{name}]')"
        ) from error


def first_line(error: Exception) -> str:
    """What another library's exception says, cut to one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
