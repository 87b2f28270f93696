"""The process of every command: one-line errors, exit statuses, signals, memory.

Exit status: 0 done, 1 unusable input, 2 wrong usage, 130 interrupted, 143 terminated. Before `install` only
the standard library is imported, so that Ctrl-C is handled during all other imports.
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
BLAS_WAIT = "OPENBLAS_THREAD_TIMEOUT"  # log2 of the cycles that idle threads spin; default 26
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def install() -> None:
    """Prepares the process; call it before JAX is imported.

    Ctrl-C during the imports exits with one line. malloc is set to keep freed memory, which must happen
    before threads start. Idle OpenBLAS threads sleep instead of spinning. The garbage collector, which takes
    a seventh of the imports' time, is off until `guarded`.
    """
    _open_standard_streams()
    gc.disable()
    os.environ.setdefault(BLAS_WAIT, "4")
    keep_memory()
    _handle_interrupt(lambda signum, frame: _exit_interrupted())
    sys.unraisablehook = _unraisablehook
    logging.getLogger("jax").setLevel(logging.WARNING)  # At INFO it names every accelerator that is missing.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # A terminal without δ is no error.


def _open_standard_streams() -> None:
    """Sends streams that are closed to the null device: else the next file opened would take their number,
    and what libraries print to them would end up in it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def run_command(command: Command) -> None:
    """Parses the flags, including JAX's own, runs the command and exits with its status."""
    text = answer(command, sys.argv)
    if text is not None:
        return guarded(lambda: print(text))

    from absl import app

    def main(argv: Sequence[str]) -> None:
        keep_compiled()
        command.action(*argv[1:])

    app.run(lambda argv: guarded(lambda: main(argv)), flags_parser=lambda argv: _parsed(command, argv))


def run(main: Callable[..., None], *, commands: Collection[str] = ()) -> None:
    """Runs a script that has defined its flags like a command; `commands` are the values of its argument."""
    about = sys.modules["__main__"].__doc__ or ""
    run_command(Command(main, about, choices=tuple(commands)))


def keep_compiled() -> None:
    """Caches compiled programs in the user's cache directory, unless JAX's own flags say otherwise.

    Compiling is half of a short run. By default JAX keeps only programs that take a second to compile.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        # A missing or read-only home directory is no error; nor is a full disk, or a damaged entry.
        with contextlib.suppress(OSError, RuntimeError):
            home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            directory = home / "jaxdelta" / "xla"
            directory.mkdir(parents=True, exist_ok=True)
            if os.access(directory, os.W_OK):
                jax.config.update("jax_compilation_cache_dir", str(directory))
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
                warnings.filterwarnings("ignore", "Error .* persistent compilation cache")


def keep_memory() -> None:
    """Makes glibc keep freed memory for the next layer.

    Returning it to the system, and faulting it in again, takes a sixth of a run on a CPU. All threads share
    one arena, as glibc's other arenas return large blocks.
    """
    with contextlib.suppress(OSError, AttributeError):  # macOS, or another C library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def guarded(main: Callable[[], None]) -> None:
    """Calls main; exits with one line after a user's mistake, and with a signal's status after a signal.

    A received signal decides the status, as libraries may catch its exception and raise another.
    """
    received: list[int] = []

    def on_signal(signum: int, frame: object) -> None:
        received.append(signum)
        raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(TERMINATED)

    gc.freeze()  # The objects of the imports stay.
    gc.enable()
    try:
        # From here on a signal raises, since there may be something to clean up.
        _handle_interrupt(on_signal)
        signal.signal(signal.SIGTERM, on_signal)
        main()
        if sys.stdout is not None:
            sys.stdout.flush()  # `print` would fail on a full device even if nothing was printed.
        _handle_interrupt(signal.SIG_IGN)  # Everything is written.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    except BaseException as error:
        if signal.SIGINT in received:
            _exit_interrupted()
        if received:
            os._exit(TERMINATED)
        _report(error)
        raise


def _report(error: BaseException) -> None:
    """Exits with one line unless the error is a bug."""
    if isinstance(error, JaxDeltaError):
        fail(str(error), error.status)
    if isinstance(error, RuntimeError | AssertionError) and (mistake := _without_device()):
        fail(str(mistake), mistake.status)
    if isinstance(error, OSError):
        if isinstance(error, BrokenPipeError) or error.filename is None:
            # Standard output is closed or full; Python must not flush it again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        fail(str(error), 1)


def _without_device() -> JaxDeltaError | None:
    """The mistake where JAX cannot start on the platform that the user wants."""
    if "jax" in sys.modules:
        from jaxdelta.utils.jax_settings import check_devices

        try:
            check_devices()
        except JaxDeltaError as error:
            return error
    return None


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
    """Raises Ctrl-C and SIGTERM again that arrived where exceptions are ignored, as in a destructor."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt | SystemExit):
        return sys.__unraisablehook__(unraisable)

    def raise_again(signum: int, frame: object, kind: type[BaseException] = unraisable.exc_type) -> None:
        raise kind(TERMINATED)

    signal.signal(signal.SIGALRM, raise_again)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def _exit_interrupted() -> NoReturn:
    """Exits at once; an ordinary exit would wait for all threads and print their unfinished output."""
    line = "\n" if sys.stderr is not None and sys.stderr.isatty() else ""  # ends the progress bar's line
    print(f"{line}{program_name()}: interrupted; nothing was written", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)
