"""Time and memory of a whole process, and a description of the machine."""

import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import threadpoolctl

from jaxdelta.errors import JaxDeltaError

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.02  # seconds between polls of a process: the resolution of its end and peak


class Cost(NamedTuple):
    """Time and memory of a process."""

    seconds: float
    gigabytes: float  # peak resident memory; 0 where the system has no /proc


def script(name: str, arguments: Sequence[str], tree: Path = ROOT) -> list[str]:
    """The command that runs a script of a tree."""
    return [sys.executable, str(tree / "scripts" / name), *arguments]


def environment(tree: Path, cache: Path) -> dict[str, str]:
    """An environment that imports a tree's own package, with its own cache of compiled programs."""
    return os.environ | {"PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(cache)}


def cost_of(command: Sequence[str], env: Mapping[str, str] | None = None) -> Cost:
    """Runs a process to its end, imports and compilation included.

    Raises:
        JaxDeltaError: it failed; the message ends with the last line of its standard error.
    """
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=env) as process:
            try:
                peak = _peak(process)
            finally:
                process.kill()  # if this process is interrupted; no effect after the end
        seconds = time.perf_counter() - start
        if process.returncode:
            raise JaxDeltaError(f"{command[1]} failed: {_last_line(errors)}")
    return Cost(seconds, peak / 1e9)


def _peak(process: subprocess.Popen[bytes]) -> int:
    """Peak resident bytes; not from rusage, which starts at the parent's peak after the fork."""
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
        time.sleep(POLL)
    return peak


def _last_line(file: IO[str]) -> str:
    file.seek(0)
    return next(reversed(file.read().strip().splitlines()), "no message")


def machine() -> dict[str, Any]:
    """The hardware and the versions that results depend on."""
    return {
        "processor": processor(),
        "blas": [pool.get("architecture", "") for pool in threadpoolctl.threadpool_info()],
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
    }


def processor() -> str:
    """The processor's name. A virtual machine may hide it; `blas` still shows its instruction set."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
