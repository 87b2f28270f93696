"""The process around every command: one-line errors, exit statuses, signals, memory.

Exit status: 0 done, 1 input that cannot be used, 2 wrong usage, 130 interrupted, 143 terminated. Only the
standard library is imported before `install`, so that Ctrl-C during the other imports is handled, too.
"""

import contextlib
import ctypes
import gc
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
from jaxdelta.utils.command import Command, answer, parse, program_name

INTERRUPTED = 130
TERMINATED = 143
BLAS_WAIT = "OPENBLAS_THREAD_TIMEOUT"  # its threads spin for 2 to that power cycles; default 26
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def install() -> None:
    """Prepares the process; call it before JAX is imported.

    Ctrl-C during the imports ends in one line, and no signal is lost after them. Freed memory is kept: some
    of malloc's settings have no effect once threads run. OpenBLAS' threads sleep between products instead of
    spinning, which leaves the cores to others. The garbage collector is off until `guarded`: it would take a
    seventh of the imports' time.
    """
    gc.disable()
    os.environ.setdefault(BLAS_WAIT, "4")
    keep_memory()
    _handle_interrupt(lambda signum, frame: _exit_interrupted())
    sys.unraisablehook = _unraisablehook
    logging.getLogger("jax").setLevel(logging.WARNING)  # At INFO it names every accelerator that is missing.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # A terminal without δ is no error.


def run_command(command: Command) -> None:
    """Parses the flags, JAX's own among them, runs the command and exits with its status."""
    text = answer(command, sys.argv)
    if text is not None:
        return guarded(lambda: print(text))

    from absl import app

    def act(arguments: Sequence[str]) -> None:
        keep_compiled()
        command.action(*arguments)

    app.run(
        lambda argv: guarded(lambda: act(argv[1:])),
        flags_parser=lambda argv: _parsed(command, argv),
    )


def run(main: Callable[..., None], *, commands: Collection[str] = ()) -> None:
    """Runs a script like a command; its flags are those it defined when it was imported.

    Args:
        main: the script; called with the chosen command if there are any.
        commands: possible values of the only argument that is not a flag.
    """
    about = sys.modules["__main__"].__doc__ or ""
    run_command(Command(main, about, choices=tuple(commands)))


def keep_compiled() -> None:
    """Caches compiled programs in the user's cache directory, unless JAX's own flags say otherwise.

    Compiling is half of a short run, and the next run needs the same programs. JAX by itself leaves out those
    that compile in less than a second; here all are kept.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        # A missing or read-only home directory is no error,
        with contextlib.suppress(OSError, RuntimeError):
            home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            directory = home / "jaxdelta" / "xla"
            directory.mkdir(parents=True, exist_ok=True)
            if os.access(directory, os.W_OK):
                jax.config.update("jax_compilation_cache_dir", str(directory))
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
                # nor is a full disk or a damaged entry.
                warnings.filterwarnings("ignore", "Error .* persistent compilation cache")


def keep_memory() -> None:
    """Makes glibc keep freed memory for the next layer.

    Returning hundreds of megabytes to the system after each layer, and faulting them in again page by page,
    costs a sixth of a run on a CPU. All threads share one arena, as glibc's other arenas return large blocks.
    """
    with contextlib.suppress(OSError, AttributeError):  # macOS, or another C library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def guarded(main: Callable[[], None]) -> None:
    """Calls main; ends in one line for a user's mistake, and with a signal's status after a signal.

    Libraries may catch a signal's exception and raise another: the signal decides how the process ends.
    """
    received: list[int] = []

    def on_signal(signum: int, frame: object) -> None:
        received.append(signum)
        raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(TERMINATED)

    gc.freeze()  # what the imports made stays
    gc.enable()
    try:
        # From here on cleaning up may be needed, so a signal raises.
        _handle_interrupt(on_signal)
        signal.signal(signal.SIGTERM, on_signal)
        main()
        # Not `print`, which writes even an empty string: a full device is no error if nothing was printed.
        if sys.stdout is not None:
            sys.stdout.flush()
        # Everything is written: nothing is left to interrupt.
        _handle_interrupt(signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    except BaseException as error:
        if signal.SIGINT in received:
            _exit_interrupted()
        if received:
            os._exit(TERMINATED)
        _report(error)
        raise


def _report(error: BaseException) -> None:
    """Exits with one line if the error is not a fault of the program's."""
    if isinstance(error, JaxDeltaError):
        fail(str(error), error.status)
    if isinstance(error, OSError):
        if isinstance(error, BrokenPipeError) or error.filename is None:
            # Standard output is closed or full: Python must not flush it again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        fail(str(error), 1)


def fail(message: str, status: int) -> NoReturn:
    """Prints one line on standard error and exits."""
    print(f"{program_name()}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def _parsed(command: Command, argv: Sequence[str]) -> list[str]:
    try:
        return parse(command, argv)
    except UsageError as error:
        fail(f"{error} (--help lists the options)", error.status)


def _handle_interrupt(action: Any) -> None:
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as for background jobs
        signal.signal(signal.SIGINT, action)


def _unraisablehook(unraisable: Any) -> None:
    """Raises Ctrl-C and SIGTERM again that arrived where exceptions are ignored, as in a destructor or in
    JAX's garbage-collection callback: they would be lost."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt | SystemExit):
        return sys.__unraisablehook__(unraisable)

    def raise_again(signum: int, frame: object, kind: type[BaseException] = unraisable.exc_type) -> None:
        raise kind(TERMINATED)

    signal.signal(signal.SIGALRM, raise_again)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def _exit_interrupted() -> NoReturn:
    """Exits at once: an ordinary exit would wait for all threads, and print what they left unfinished."""
    line = "\n" if sys.stderr is not None and sys.stderr.isatty() else ""  # leaves that of the progress bar
    print(f"{line}{program_name()}: interrupted; nothing was written", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)
