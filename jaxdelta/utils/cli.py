"""The frame around every script: flags, one-line errors, exit statuses, interruption.

Exit status: 0 done, 1 input that cannot be used, 2 wrong usage, 130 interrupted. Nothing but the standard
library is imported before the frame is installed, so that Ctrl-C finds it there.
"""

import contextlib
import ctypes
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxdelta.errors import JaxDeltaError, UsageError

INTERRUPTED = 130
TERMINATED = 143
BLAS_WAIT = "OPENBLAS_THREAD_TIMEOUT"  # its threads' time in a loop: 2 to that power, in cycles; 26 by itself
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def install() -> None:
    """Makes Ctrl-C during the imports end in a line, and lets no signal be lost after them.

    Memory is kept from here on: once threads have begun, it is too late for some of that. OpenBLAS' threads,
    which after each product wait for the next one in a loop, sleep at once instead: others want their cores.
    """
    os.environ.setdefault(BLAS_WAIT, "4")
    keep_memory()
    _on_interrupt(lambda signum, frame: _end_interrupted())
    sys.unraisablehook = _unraisablehook
    logging.getLogger("jax").setLevel(logging.WARNING)  # It tells of every accelerator it did not find.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # A δ the terminal lacks is no reason to fail.


def run(
    main: Callable[..., None],
    *,
    required: Sequence[str] = (),
    commands: Collection[str] = (),
    arguments: bool = False,
) -> None:
    """Parses the flags, JAX's own among them, calls main and exits with the status its end deserves.

    Args:
        main: the script; where there are commands it is called with the one given.
        required: flags that must be set.
        commands: what the one argument that is no flag may be.
        arguments: whether there may be others, which main is called with; without the two, all are flags.
    """
    from absl import app

    app.run(
        lambda argv: _guarded(lambda: main(*argv[1:])),
        flags_parser=lambda argv: _parse_flags(argv, required, commands, arguments),
    )


def value_of(flag: Any) -> Any:
    """That of a flag without which `run` does not call main: absl's type says that it may be None."""
    assert flag.value is not None
    return flag.value


def keep_compiled() -> None:
    """Keeps compiled programs in the user's cache directory, unless JAX was told where, or not to.

    Half of a short run is compiling, and the next run needs the same programs: all of them, since to compile
    those that take less than a tenth of a second is a twentieth of it.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        # No home, or one that cannot be written to, is no reason to fail.
        with contextlib.suppress(OSError, RuntimeError):
            home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            directory = home / "jaxdelta" / "xla"
            directory.mkdir(parents=True, exist_ok=True)
            if os.access(directory, os.W_OK):
                jax.config.update("jax_compilation_cache_dir", str(directory))
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
                # Nor is a full disk, or a damaged entry.
                warnings.filterwarnings("ignore", "Error .* persistent compilation cache")


def keep_memory() -> None:
    """Tells glibc to keep freed memory for the next layer: returning hundreds of megabytes to the system
    after each, and taking them anew page by page, costs a sixth of a run on a CPU.

    All threads share one arena: others hold no large blocks, which come from the system and go back to it.
    """
    with contextlib.suppress(OSError, AttributeError):  # macOS, or another C library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def _guarded(main: Callable[[], None]) -> None:
    """Whatever comes of a signal, which libraries may catch and wrap, the process ends as one it ended."""
    received: list[int] = []

    def strike(signum: int, frame: object) -> None:
        received.append(signum)
        raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(TERMINATED)

    try:
        # From here on there may be something to tidy up.
        _on_interrupt(strike)
        signal.signal(signal.SIGTERM, strike)
        keep_compiled()
        main()
        # Not `print`, which writes even nothing: a full device that was told nothing is no error.
        if sys.stdout is not None:
            sys.stdout.flush()
        # And from here on there is not: everything is written.
        _on_interrupt(signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    except BaseException as error:
        if signal.SIGINT in received:
            _end_interrupted()
        if received:
            os._exit(TERMINATED)
        _explain(error)
        raise


def _explain(error: BaseException) -> None:
    """Ends in one line what is no error of ours."""
    if isinstance(error, JaxDeltaError):
        fail(str(error), error.status)
    if isinstance(error, OSError):
        if isinstance(error, BrokenPipeError) or error.filename is None:
            # Our output went away or is full: nothing more can be said to it, not even at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        fail(str(error), 1)


def fail(message: str, status: int) -> None:
    """Says why in one line on standard error and exits."""
    print(f"{script_name()}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def script_name() -> str:
    """The running script's file name."""
    return os.path.basename(sys.argv[0])


def _parse_flags(
    argv: list[str], required: Sequence[str], commands: Collection[str], arguments: bool
) -> list[str]:
    import jax
    from absl import app, flags

    try:
        jax.config.parse_flags_with_absl()
        # Only now: JAX parses its own flags alone first, and would miss the required ones.
        flags.mark_flags_as_required(required)
        flags.FLAGS.set_gnu_getopt(True)  # Flags may come after the command.
        rest = app.parse_flags_with_usage(argv) if _wants_help(argv) else flags.FLAGS(argv)
        if commands and (len(rest) < 2 or rest[1] not in commands):
            raise UsageError(f"say what to do: {', '.join(commands)}")
        if not arguments and (extra := rest[1 + bool(commands) :]):
            raise UsageError(f"unexpected argument {extra[0]!r}; every option is --name=value")
    except (flags.Error, UsageError) as error:
        fail(f"{error} (--help lists the options)", UsageError.status)
    return list(rest)


def _wants_help(argv: list[str]) -> bool:
    names = ("help", "helpfull", "helpshort", "helpxml")
    return any(arg.startswith("-") and arg.lstrip("-").split("=")[0] in names for arg in argv[1:])


def _on_interrupt(action: Any) -> None:
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as for a script's background jobs
        signal.signal(signal.SIGINT, action)


def _unraisablehook(unraisable: Any) -> None:
    """Ctrl-C and SIGTERM that struck where nothing can be raised, as in JAX's callback of the garbage
    collector, would be lost: they are raised again when the callback is over."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt | SystemExit):
        return sys.__unraisablehook__(unraisable)

    def again(signum: int, frame: object, kind: type[BaseException] = unraisable.exc_type) -> None:
        raise kind(TERMINATED)

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def _end_interrupted() -> NoReturn:
    """Ends now: an ordinary exit would wait for all threads, and tell of all that is half done."""
    print(f"{script_name()}: interrupted; nothing was written", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)
