"""The frame of the scripts, in small scripts of their own: no JAX is imported here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERRUPTED = "script.py: interrupted; nothing was written\n"

SCRIPT = """
import gc, os, signal, sys, time, types
from pathlib import Path
from jaxdelta import errors
from jaxdelta.utils import cli, files

signal.signal(signal.SIGINT, signal.{before})
cli.install()
here = Path(__file__).parent
sys.modules["jax"] = types.SimpleNamespace(
    config=types.SimpleNamespace(values={{"jax_compilation_cache_dir": ""}})
)

def send(*_):
    os.kill(os.getpid(), signal.{sent})
    time.sleep(0.05)

def main():
    {main}

{start}
cli.guarded(main)
{end}
"""


def run(
    tmp_path: Path,
    main: str = "pass",
    *,
    start: str = "",
    end: str = "",
    sent: str = "SIGINT",
    before: str = "default_int_handler",
) -> subprocess.CompletedProcess[str]:
    """Runs a script in the frame; it has `send()`, which sends it the signal `sent`."""
    script = tmp_path / "script.py"
    main = "\n    ".join(main.splitlines())
    script.write_text(SCRIPT.format(main=main, start=start, end=end, sent=sent, before=before))
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)


both = pytest.mark.parametrize(
    ("sent", "status", "said"), [("SIGINT", 130, INTERRUPTED), ("SIGTERM", 143, "")]
)


@both
def test_signal(tmp_path: Path, sent: str, status: int, said: str) -> None:
    found = run(tmp_path, "send()\ntime.sleep(30)", sent=sent)
    assert (found.returncode, found.stderr) == (status, said)


@both
@pytest.mark.parametrize("where", ["garbage collection", "destructor"])
def test_signal_where_nothing_can_be_raised(
    tmp_path: Path, sent: str, status: int, said: str, where: str
) -> None:
    bodies = {
        "destructor": "class Late:\n    __del__ = send\nLate()",
        "garbage collection": "gc.callbacks.append(lambda *_: gc.callbacks.clear() or send())\ngc.collect()",
    }
    found = run(tmp_path, bodies[where] + "\ntime.sleep(30)", sent=sent)
    assert (found.returncode, found.stderr) == (status, said)


@both
@pytest.mark.parametrize("error", ["ValueError", "OSError", "errors.JaxDeltaError"])
def test_signal_that_a_library_wraps(tmp_path: Path, sent: str, status: int, said: str, error: str) -> None:
    main = f"try:\n    send()\nexcept BaseException as reason:\n    raise {error}('lost') from reason"
    found = run(tmp_path, main, sent=sent)
    assert (found.returncode, found.stderr) == (status, said)


@both
def test_signal_and_what_is_left_at_exit(tmp_path: Path, sent: str, status: int, said: str) -> None:
    """Python would tell of a coroutine that nobody waited for."""
    found = run(tmp_path, "async def task(): pass\nsys.left = task()\nsend()", sent=sent)
    assert (found.returncode, found.stderr) == (status, said)


def test_interrupted_during_the_imports(tmp_path: Path) -> None:
    """Also where a library catches everything."""
    found = run(tmp_path, start="try:\n    send()\nexcept:\n    pass")
    assert (found.returncode, found.stderr) == (130, INTERRUPTED)


def test_interrupted_when_all_is_done(tmp_path: Path) -> None:
    found = run(tmp_path, end="send()")
    assert (found.returncode, found.stderr) == (0, "")


def test_what_is_registered_for_the_end_is_called(tmp_path: Path) -> None:
    start = "import atexit; atexit.register(print, 'registered')"
    found = run(tmp_path, "print('done')", start=start)
    assert (found.returncode, found.stdout, found.stderr) == (0, "done\nregistered\n", "")
    failed = run(tmp_path, "raise errors.JaxDeltaError('none')", start=start)
    assert (failed.returncode, failed.stdout) == (1, "registered\n")


def test_background_jobs_are_not_interrupted(tmp_path: Path) -> None:
    """A shell without job control starts them with the signal ignored, and so it stays."""
    found = run(tmp_path, "send()", start="send()", before="SIG_IGN")
    assert (found.returncode, found.stderr) == (0, "")


def test_other_exceptions_that_cannot_be_raised_are_told(tmp_path: Path) -> None:
    found = run(tmp_path, "class Late:\n    def __del__(self): 1 / 0\nLate()")
    assert found.returncode == 0
    assert "ZeroDivisionError" in found.stderr


def test_other_exceptions_have_their_traceback(tmp_path: Path) -> None:
    found = run(tmp_path, "1 / 0")
    assert found.returncode == 1
    assert "Traceback" in found.stderr
    assert "ZeroDivisionError" in found.stderr


def test_no_output_at_all(tmp_path: Path) -> None:
    """A standard output that was closed is None in Python."""
    found = run(tmp_path, "print('x')", start="sys.stdout = None")
    assert (found.returncode, found.stderr) == (0, "")


@both
def test_signal_while_files_are_written(tmp_path: Path, sent: str, status: int, said: str) -> None:
    """At the second file: both are there under their temporary names then."""
    (tmp_path / "out").mkdir()
    main = (
        "late = here / 'out' / f'.b.{os.getpid()}.tmp'\n"
        "os.fsync = lambda descriptor: send() if late.exists() else None\n"
        "files.write_together({here / 'out' / 'a': b'a', here / 'out' / 'b': b'b'})"
    )
    found = run(tmp_path, main, sent=sent)
    assert (found.returncode, found.stderr) == (status, said)
    assert not os.listdir(tmp_path / "out")
