"""Run as a script, in a process of its own: JAX's number of devices is set once, before it starts.

    python on_mesh.py runs CHECKPOINT TEXT DIRECTORY   all MESHES on four devices, each saved under its name
    python on_mesh.py script MODE FLAG ...             delta_svd.py; MODE is short or long, or MODE-broken

`short`: the layers are summarised from rows, `long`: from moments. `broken`: of several processes the last
fails.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from jaxdelta.utils import cli

if __name__ == "__main__":
    cli.install()  # before JAX is imported, as in the scripts: at the end JAX waits for the other process

from jaxdelta.sweep.sweep import Blocks

LAYOUT = {"layout": "packed", "seq_len": 32, "max_tokens": 700, "top_k": 4}
FEW = {"views": "masked", "bootstrap": 0, "null_draws": 0}
SHORT, LONG = Blocks(24, 32), Blocks(8, 32)
# (mesh, blocks, options); the last ones divide the work otherwise than the runs on one device do.
MESHES: dict[str, list[tuple[str, Blocks, dict[str, Any]]]] = {
    "short": [
        ("data:1", SHORT, {}),
        ("data:4", SHORT, FEW),
        ("model:4", SHORT, FEW),
        ("data:2,model:2", Blocks(4, 16), {}),
    ],
    "long": [
        ("data:1", LONG, {}),
        ("data:4", LONG, {}),
        ("model:4", LONG, FEW),
        ("model:2,data:2", Blocks(8, 16, "host"), FEW),
    ],
}


def divide(mode: str, blocks: Blocks) -> None:
    """Runs that follow are divided so."""
    from jaxdelta.run.memory_plan import MemoryDemand

    MemoryDemand._makers = lambda work: [0 if mode == "short" else work.measurement.groups]
    MemoryDemand._divisions = lambda work, groups: iter([blocks])


def runs(checkpoint: str, text: str, directory: str) -> None:
    from jaxdelta import analyze
    from jaxdelta.sweep import mesh as parallel

    devices = parallel.jax.devices
    for mode, meshes in MESHES.items():
        for number, (mesh, blocks, options) in enumerate(meshes):
            divide(mode, blocks)
            parallel.jax.devices = lambda number=number: devices()[: 4 if number else 1]
            analyze(checkpoint, text, mesh=mesh, **LAYOUT, **options).save(
                Path(directory) / f"{mode}{number}.json"
            )


def script(mode: str, *flags: str) -> None:
    mode, _, broken = mode.partition("-")
    divide(mode, {"short": SHORT, "long": LONG}[mode])
    if broken and "--process_id=1" in flags:
        from jaxdelta.checkpoint.checkpoint import Checkpoint
        from jaxdelta.errors import JaxDeltaError

        read = Checkpoint.placed_layer

        def fail(self: Checkpoint, index: int, place: Any) -> Any:
            if index == self.config.num_layers - 2:
                raise JaxDeltaError("the disk is gone")
            return read(self, index, place)

        Checkpoint.placed_layer = fail
    path = Path(__file__).parents[1] / "scripts" / "delta_svd.py"
    sys.argv = [str(path), *flags, *(f"--{name}={value}" for name, value in (LAYOUT | FEW).items())]
    runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    {"runs": runs, "script": script}[sys.argv[1]](*sys.argv[2:])
