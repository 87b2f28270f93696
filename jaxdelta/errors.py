"""The errors that a user can cause; commands print them in one line and exit with `status`."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

LONGEST_REASON = 240  # characters of another library's words


class JaxDeltaError(Exception):
    """Unusable input: a file, a checkpoint, a text. The message names the input and how to fix it."""

    status = 1

    def __str__(self) -> str:
        """The message; half a surrogate pair, which no terminal prints, is escaped."""
        return super().__str__().encode(errors="backslashreplace").decode()


class UsageError(JaxDeltaError, ValueError):
    """An option with an impossible value; the message names the option."""

    status = 2


def first_line(error: Exception, most: int = LONGEST_REASON) -> str:
    """The reason for an error in one line: the system's words, or the message's first line, or the type."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return short(text.splitlines()[0], most)


def short(name: str, most: int = 56) -> str:
    """A name from a file as a message shows it: its middle left out, control characters escaped."""
    name = name if name.isprintable() else ascii(name)[1:-1]
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2) :]}"


def listed(names: Collection[str], what: str = "tensors") -> str:
    """Names in a message: up to three, else their number and the first three."""
    if len(names) <= 3:
        return ", ".join(map(short, names))
    return f"{len(names)} {what} ({', '.join(map(short, list(names)[:3]))}, …)"


@contextlib.contextmanager
def plain_errors(
    subject: object,
    messages: Mapping[Any, str],
    *,
    reason: Callable[[Exception], str] = first_line,
    **details: object,
) -> Iterator[None]:
    """Turns other libraries' errors into a JaxDeltaError.

    Args:
        subject: the input, such as a path.
        messages: type of error, or a tuple of types -> message, a format of subject, reason and details; the
            first that matches counts, and an error that matches none passes.
        reason: takes it from the error.
        **details: other values that messages name.
    """
    try:
        yield
    except JaxDeltaError:
        raise
    except Exception as error:
        for kinds, message in messages.items():
            if isinstance(error, kinds):
                raise JaxDeltaError(message.format(subject, reason(error), **details)) from error
        raise


def extra(name: str, what: str) -> contextlib.AbstractContextManager[None]:
    """Wraps an import that `what` needs; if it fails, a JaxDeltaError says which extra to install."""
    message = "{} needs {}, which is not installed (pip install 'jaxdelta[{extra}]')"
    return plain_errors(what, {ModuleNotFoundError: message}, reason=_missing_package, extra=name)


def _missing_package(error: Any) -> str:
    return str(error.name or "").partition(".")[0]
