"""The frame around every script: flags, one-line errors, exit statuses, interruption.

Exit status: 0 done, 1 input that cannot be used, 2 wrong usage, 130 interrupted. Nothing heavy is imported
here, so that a script can install the frame before it imports JAX.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from types import TracebackType

from absl import app, flags

from jaxdelta.errors import JaxDeltaError, UsageError

INTERRUPTED = 130
TERMINATED = 143


def install() -> None:
    """Makes Ctrl-C during the imports end in a line too, and SIGTERM clean up like any other end."""
    sys.excepthook = _excepthook
    logging.getLogger("jax").setLevel(logging.WARNING)  # It tells of every accelerator it did not find.
    signal.signal(signal.SIGTERM, _terminate)


def run(main: Callable[..., None], *, required: Sequence[str] = (), commands: Collection[str] = ()) -> None:
    """Parses the flags, JAX's own among them, calls main and exits with the status its end deserves.

    Args:
        main: the script; where there are commands it is called with the one given.
        required: flags that must be set.
        commands: what the one argument that is no flag may be; without them there is no such argument.
    """
    app.run(
        lambda argv: _guarded(lambda: main(*argv[1:])),
        flags_parser=lambda argv: _parse_flags(argv, required, commands),
    )


def _guarded(main: Callable[[], None]) -> None:
    try:
        main()
        sys.stdout.flush()
    except JaxDeltaError as error:
        fail(str(error), error.status)
    except KeyboardInterrupt:
        fail("interrupted; nothing was written", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away: nothing more can be said to it, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def fail(message: str, status: int) -> None:
    """Says why in one line on standard error and exits."""
    print(f"{script_name()}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def script_name() -> str:
    """The running script's file name."""
    return os.path.basename(sys.argv[0])


def _parse_flags(argv: list[str], required: Sequence[str], commands: Collection[str]) -> list[str]:
    import jax

    try:
        jax.config.parse_flags_with_absl()
        # Only now: JAX parses its own flags alone first, and would miss the required ones.
        flags.mark_flags_as_required(required)
        flags.FLAGS.set_gnu_getopt(True)  # Flags may come after the command.
        rest = app.parse_flags_with_usage(argv) if _wants_help(argv) else flags.FLAGS(argv)
        if commands and (len(rest) < 2 or rest[1] not in commands):
            raise UsageError(f"say what to do: {', '.join(commands)}")
        if extra := rest[1 + bool(commands) :]:
            raise UsageError(f"unexpected argument {extra[0]!r}; every option is --name=value")
    except (flags.Error, UsageError) as error:
        fail(f"{error} (--help lists the options)", UsageError.status)
    return list(rest)


def _wants_help(argv: list[str]) -> bool:
    return any(
        arg.lstrip("-").split("=")[0] in ("help", "helpfull", "helpshort", "helpxml") for arg in argv[1:]
    )


def _terminate(signum: int, frame: object) -> None:
    sys.exit(TERMINATED)


def _excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(f"{script_name()}: interrupted; nothing was written", file=sys.stderr)
        os._exit(INTERRUPTED)
    sys.__excepthook__(kind, error, traceback)
