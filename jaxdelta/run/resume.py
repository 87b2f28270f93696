"""Resuming a run that was killed: after every layer the states and the layer's record are kept.

Files in the run's directory, `DIR/jaxdelta-run`:

    manifest.json       what must be equal for a run to resume from here
    step-L/block-B      the states of block B after layer L; the last two steps are kept
    record-L            the record of layer L
    moments/            the moments for --keep_moments, until the run ends
    step-L.json         completes step L: digests of its blocks, and of records and moments up to layer L

Orbax writes blocks and records; with several processes TensorStore does, in Orbax's format. One thread
writes them, in order, while the pass continues, so a step's content is on disk before step-L.json.

Each of several processes keeps the states of its windows, in `jaxdelta-run`, `jaxdelta-run-1`, ..., on its
own disk or on a shared one. They resume from the last step that is complete for all of them.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from textwrap import shorten
from typing import Any

import jax
import numpy as np

from jaxdelta.checkpoint.checkpoint import Checkpoint
from jaxdelta.checkpoint.orbax_files import open_arrays, quiet, save_arrays, write_arrays
from jaxdelta.errors import JaxDeltaError, first_line, plain_errors
from jaxdelta.run.context import RunContext
from jaxdelta.run.provenance import device, versions
from jaxdelta.run.record_files import pack, unpack
from jaxdelta.spectra.moments.files import layer_file
from jaxdelta.statistics.layer_row import LayerRecord
from jaxdelta.sweep.states import State, States
from jaxdelta.utils.files import locked, write_together

RUN, MANIFEST, MOMENTS = "jaxdelta-run", "manifest.json", "moments"
STEPS = 2  # complete steps whose states are kept
PENDING = 2  # layers summarised concurrently: a step is complete only when its layer's record is there

# Options that change no number except through the blocks, which are compared themselves.
_FREE = ("checkpoint_dir", "scratch", "device_memory_gb")
_WAITING = 2  # writes in the queue; the pass waits for the disk when there are more
_NUMBERED = re.compile(r"(?:step|record)-(\d{6})(?:\.json)?")
Arrays = Mapping[str, np.ndarray]


class Run:
    """A run's checkpoint, the thread that writes it, and `start`, the layer to resume with.

    The states after a layer stay until a later step is complete.
    """

    start = 0

    def __init__(self, directory: Path, layers: int, listener: Callable[[str], None]):
        self._directory, self._layers, self._listener = directory, layers, listener
        self._writer, self._failed = ThreadPoolExecutor(1, "checkpoint"), False
        self._waiting: deque[Future[None]] = deque()
        # The last complete step of this process, and the last one of all processes, which must be kept.
        self._whole = self._common = -1
        # Digests of the files on disk; once the writing thread runs, only it touches them.
        self._records: list[str] = []
        self._moments: list[str] = []
        self._blocks: dict[int, list[str]] = {}

    def keeps(self, layer: int) -> bool:
        """Whether the states after this layer are kept: all but the last layer's."""
        return layer < self._layers - 1

    def restore(self, states: States) -> int:
        """Restores the states of the last undamaged step; returns the layer to resume with, or 0."""
        self._states = states
        steps = self._steps()
        while (layer := _least(max(steps, default=-1))) >= 0:
            if _least(layer in steps and self._is_restored(layer, states)):
                self.start = layer + 1
                self._whole = self._common = layer
                self._listener(f" resumed after layer {layer}")
                break
            self._records, self._moments = [], []
            steps = [step for step in steps if step < layer]
        for path in list(self._directory.iterdir()):
            if path.name != MANIFEST and not self._is_used(path):
                _remove(path)
        return self.start

    def _is_restored(self, layer: int, states: States) -> bool:
        try:
            self._restore(layer, states)
        except _Damaged as error:
            self._listener(f" what was kept after layer {layer} is damaged ({error}): it is not used")
            return False
        return True

    def _is_used(self, path: Path) -> bool:
        """Whether the run resumes from this file, or may have to later."""
        if path.name == MOMENTS:
            return self.start > 0
        number = _NUMBERED.fullmatch(path.name)
        complete = path.name.startswith("record") or path.with_suffix(".json").exists()
        return number is not None and int(number[1]) < self.start and complete

    def _restore(self, layer: int, states: States) -> None:
        try:
            step = json.loads(self._path("step", layer, ".json").read_bytes())
            blocks, records, moments = (list(step[name]) for name in ("blocks", "records", "moments"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _Damaged(f"step-{layer:06}.json: {error!r}") from error
        for index, digest in enumerate(records):
            self._record_of(index, digest)
        for index, digest in enumerate(moments):
            if _file_digest(self._moments_of(index)) != digest:
                raise _Damaged(f"{MOMENTS}: layer {index} differs")
        for block, digest in enumerate(blocks):
            states[block] = State(**_load(self._path("step", layer) / f"block-{block:06}", digest))
        self._records, self._moments = records, moments

    def _record_of(self, layer: int, digest: str) -> LayerRecord:
        return unpack(_load(self._path("record", layer), digest)["record"].tobytes())

    def keep(self, layer: int, block: int, state: State) -> None:
        """Keeps the states of a block after a layer."""
        if self.keeps(layer):
            arrays = self._states.fetch(state)._asdict()
            # A copy, since the next layer overwrites the states.
            self._submit(self._keep, layer, block, {name: np.array(x) for name, x in arrays.items()})

    def records(self) -> list[LayerRecord]:
        """The records of the layers before `start`."""
        return [self._record_of(layer, digest) for layer, digest in enumerate(self._records[: self.start])]

    def keep_record(self, layer: int, record: LayerRecord) -> None:
        """Keeps the record of a layer; call it in the layers' order."""
        if self.keeps(layer):
            self._common = _least(self._whole)
            self._submit(self._finish, layer, record)

    def wait(self) -> None:
        """Waits until everything is written; raises the first error of writing."""
        while self._waiting:
            self._waiting.popleft().result()

    def close(self) -> None:
        """Ends the writing thread when everything is written."""
        self._writer.shutdown()

    def _submit(self, write: Callable[..., None], *args: Any) -> None:
        while len(self._waiting) >= _WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._writer.submit(self._write, write, *args))

    def _write(self, write: Callable[..., None], *args: Any) -> None:
        """Runs on the writing thread. After a failed write no later step may count as complete."""
        if not self._failed:
            self._failed = True
            write(*args)
            self._failed = False

    def _keep(self, layer: int, block: int, arrays: Arrays) -> None:
        digest = _save(self._path("step", layer) / f"block-{block:06}", arrays)
        self._blocks.setdefault(layer, []).append(digest)

    def _finish(self, layer: int, record: LayerRecord) -> None:
        """Writes the record and completes the step, whose states are on disk by now."""
        packed = np.frombuffer(pack(record), np.uint8)
        self._records.append(_save(self._path("record", layer), {"record": packed}))
        if digest := _file_digest(self._moments_of(layer)):
            self._moments.append(digest)
        step = {"blocks": self._blocks.pop(layer), "records": self._records, "moments": self._moments}
        write_together({self._path("step", layer, ".json"): json.dumps(step).encode()})
        self._whole = layer
        common = layer if jax.process_count() == 1 else self._common
        for old in self._steps()[:-STEPS]:
            if old < common:
                _remove(self._path("step", old, ".json"))
                _remove(self._path("step", old))

    def _steps(self) -> list[int]:
        """The layers whose steps are complete."""
        return sorted(int(step.stem.removeprefix("step-")) for step in self._directory.glob("step-*.json"))

    def _path(self, kind: str, layer: int, suffix: str = "") -> Path:
        return self._directory / f"{kind}-{layer:06}{suffix}"

    def _moments_of(self, layer: int) -> Path:
        return layer_file(self._directory / MOMENTS, layer)


@contextlib.contextmanager
def opened(
    directory: str, manifest: Mapping[str, Any], layers: int, listener: Callable[[str], None]
) -> Iterator[Run]:
    """The checkpoint in a directory, which is created if it is missing.

    `manifest`, in JSON's types, must equal the one there; `layers` is the model's number of layers; the
    listener gets a line if the run resumes.

    Raises:
        JaxDeltaError: the checkpoint belongs to another run, is in use, or cannot be written.
    """
    path = _local(directory)
    with plain_errors(path.parent, {OSError: "{}: no checkpoint can be kept there ({})"}):
        path.mkdir(parents=True, exist_ok=True)
    with quiet(), locked(path) as ours:
        if not ours:
            raise JaxDeltaError(
                f"{path}: another run is using it, or it cannot be locked; choose another --checkpoint_dir"
            )
        _check(path, manifest)
        with contextlib.closing(Run(path, layers, listener)) as run:
            yield run


def _local(directory: str) -> Path:
    """This process' part of a checkpoint."""
    index = jax.process_index()
    return Path(directory).expanduser().absolute() / (f"{RUN}-{index}" if index else RUN)


def moments(directory: str | None) -> Path | None:
    """Where a run with a checkpoint collects its moments; None without a checkpoint."""
    return None if directory is None else _local(directory) / MOMENTS


def manifest(run: RunContext, checkpoint: Checkpoint) -> dict[str, Any]:
    """What must be equal for a run to resume, by name: all that may change the last bit of a number."""
    cpu = jax.default_backend() == "cpu"
    options = dataclasses.asdict(run.options)
    return {
        **versions(),
        "device": device(),
        "layers summarised at once": run.plan.at_once,
        "jax_default_matmul_precision": jax.config.values["jax_default_matmul_precision"],
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "cores": os.cpu_count() if cpu else None,  # XLA divides matrix products among them
        **{f"config.json: {name}": x for name, x in dataclasses.asdict(checkpoint.config).items()},
        "weights": run.identity.weights,
        **{f"--{name}": value for name, value in options.items() if name not in _FREE},
        "text": run.sample.tokens.fingerprint,
        **{f"blocks: {name}": value for name, value in run.plan.blocks._asdict().items()},
    }


def remove(directory: str | None) -> None:
    """Removes the checkpoint of a finished run, once all processes have called this."""
    if directory is not None:
        _least(0)
        _remove(
            _local(directory) / MANIFEST
        )  # first: without it the rest is ignored, should we be killed now
        _remove(_local(directory))


def _least(number: int) -> int:
    """The least number over all processes, each of which must call this."""
    if jax.process_count() == 1:
        return number
    from jax.experimental.multihost_utils import process_allgather

    return int(process_allgather(np.int32(number)).min())


def _check(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Refuses another run's checkpoint; without a manifest, the directory is emptied."""
    file, wanted = directory / MANIFEST, json.loads(json.dumps(manifest))
    fix = f"choose another --checkpoint_dir, or delete {directory}"
    if not file.exists():
        for path in list(directory.iterdir()):
            _remove(path)
        write_together({file: json.dumps(wanted, indent=1).encode()})
        return
    try:
        kept = dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise JaxDeltaError(f"{file}: cannot be read ({first_line(error)}); {fix}") from error
    for name in {**wanted, **kept}:
        if (before := kept.get(name)) != (current := wanted.get(name)):
            was, now = (shorten(json.dumps(value), 80, placeholder="...") for value in (before, current))
            raise JaxDeltaError(f"{directory}: is of another run: {name} was {was}, now it is {now}; {fix}")


class _Damaged(JaxDeltaError):
    """A file of the checkpoint is missing or has changed."""


def _save(path: Path, arrays: Arrays) -> str:
    """Writes arrays and returns their digest."""
    try:
        # Orbax would wait for all processes, which have different arrays to save.
        (save_arrays if jax.process_count() == 1 else write_arrays)(path, arrays)
    except Exception as error:  # Orbax raises whatever comes to hand.
        raise JaxDeltaError(
            f"{path}: cannot be written ({first_line(error)}); choose another --checkpoint_dir"
        ) from error
    return _digest(arrays)


def _load(path: Path, digest: str) -> Arrays:
    what = "/".join(path.parts[-2:]).removeprefix(f"{RUN}/")
    try:
        arrays = {name: array.read().result() for name, array in open_arrays(path).items()}
    except Exception as error:  # TensorStore raises whatever comes to hand.
        raise _Damaged(f"{what}: {first_line(error)[:80]}") from error
    if _digest(arrays) != digest:
        raise _Damaged(f"{what}: its digest differs")
    return arrays


def _file_digest(path: Path) -> str | None:
    """The digest of a file; None if it is missing."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return None


def _digest(arrays: Arrays) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
