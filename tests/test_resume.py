"""A run that was stopped goes on from its last finished layer, and ends in the same numbers bit for bit."""

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from stopped_runs import TEXT, bits, in_blocks, run, stopped, text

from jaxdelta import analyze, load_model
from jaxdelta.checkpoint.checkpoint import open_checkpoint
from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.run import analyze as analysis
from jaxdelta.run import record_files, resume
from jaxdelta.run.fingerprint import weights_fingerprint
from jaxdelta.run.resume import RUN, Run
from jaxdelta.statistics.layer_row import LayerRecord
from jaxdelta.sweep.states import LOCATIONS, State, States, scratch_directory
from jaxdelta.utils.files import locked

LAYERS = 4  # of the tiny checkpoint


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("checkpoint")] == []


@pytest.fixture
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """`short`: from rows; else where the states wait of a text in several blocks, from moments."""
    if request.param != "short":
        in_blocks(monkeypatch, request.param)
    return request.param


# ------------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("place", ["short", *LOCATIONS], indirect=True)
def test_stopped_at_every_layer(place: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """One run, stopped a layer further every time; the states of two steps are kept and no more."""
    scratch, directory = tmp_path / "scratch", tmp_path / "checkpoints"
    scratch.mkdir()
    where = {"scratch": str(scratch)}
    for layer in range(1, LAYERS + 1):
        said = stopped(tiny_checkpoint, directory, layer, **where)
        # A layer is finished when its record is there: while the next one passes.
        assert said == ([f"resumed after layer {layer - 3}"] if layer >= 3 else [])
        steps = range(max(0, layer - 3), layer - 1)
        assert {path.name for path in (directory / RUN).iterdir()} == {
            "manifest.json",
            *(f"step-{step:06}{suffix}" for step in steps for suffix in ("", ".json")),
            *(f"step-{step:06}" for step in {layer - 1} & set(range(LAYERS - 1))),
            *(f"record-{index:06}" for index in range(layer - 1)),
        }
    found, said = run(tiny_checkpoint, directory, **where)
    assert said == [f"resumed after layer {LAYERS - 2}"]
    assert not [*directory.iterdir(), *scratch.iterdir()]
    assert bits(found) == bits(run(tiny_checkpoint, None, **where)[0])


def test_bfloat16_and_resident(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The residual stream in bfloat16, all weights loaded before, a control's at that."""
    options = {"residual_dtype": "bfloat16", "memory": "resident", "control": "permuted_weights"}
    stopped(tiny_checkpoint, tmp_path, 3, **options)
    found, said = run(tiny_checkpoint, tmp_path, **options)
    assert said == ["resumed after layer 1"]
    assert bits(found) == bits(run(tiny_checkpoint, None, **options)[0])


def test_moments_are_kept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Those of layers that passed before the run was stopped, too; damaged ones are made again."""
    for number, start in enumerate((2, 1)):
        options = {"keep_moments": str(tmp_path / f"moments-{number}")}
        stopped(tiny_checkpoint, tmp_path / "run", 4, **options)
        waiting = tmp_path / "run" / RUN / "moments"
        assert not Path(options["keep_moments"]).exists()
        if start == 1:
            flip(waiting / "layer-002.safetensors", 0.5)
        _, said = run(tiny_checkpoint, tmp_path / "run", **options)
        assert said[-1] == f"resumed after layer {start}"
        assert not [*(tmp_path / "run").iterdir()]
    run(tiny_checkpoint, None, keep_moments=str(tmp_path / "whole"))
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    for number in range(2):
        found = tmp_path / f"moments-{number}"
        assert {path.name for path in found.iterdir()} == names
        for name in names - {"run.json"}:
            assert (found / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_moments_need_a_place(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Said before a layer passes; what is there stays."""
    (tmp_path / "of the user").mkdir()
    (tmp_path / "of the user" / "notes").touch()
    with pytest.raises(JaxDeltaError, match="of the user: is there already; remove it"):
        run(tiny_checkpoint, tmp_path / "run", keep_moments=str(tmp_path / "of the user"))
    assert not (tmp_path / "run").exists()


def test_the_caller_removes_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As long as the result is nowhere, what was kept is not given up."""
    found, _ = run(tiny_checkpoint, tmp_path, keep_checkpoint=True)
    again, said = run(tiny_checkpoint, tmp_path, keep_checkpoint=True)
    assert said == [f"resumed after layer {LAYERS - 2}"]
    assert bits(again) == bits(found)
    (tmp_path / "of the user").touch()
    resume.remove(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["of the user"]


# --------------------------------------------------------------------------------------------- other runs


@pytest.fixture(scope="module")
def left(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that stopped after its last layer; not to be written to."""
    directory = tmp_path_factory.mktemp("left")
    stopped(tiny_checkpoint, directory, LAYERS)
    return directory


@pytest.fixture
def copy(left: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(left, tmp_path / "copy"))


def test_each_entry_of_the_manifest_is_compared(left: Path) -> None:
    manifest = json.loads((left / RUN / "manifest.json").read_text())
    assert {"jax", "jaxdelta", "device", "weights", "text", "--seed", "--views", "blocks: windows"} <= set(
        manifest
    )
    assert not {"--scratch", "--checkpoint_dir"} & set(manifest)
    for name in manifest:
        other = manifest | {name: "another"}
        mend = r"choose another --checkpoint_dir, or delete .*jaxdelta-run"
        with (
            pytest.raises(JaxDeltaError, match=f"another run: {name} was .*; {mend}"),
            resume.opened(str(left), other, LAYERS, print),
        ):
            pass


def test_another_run_is_refused(copy: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(JaxDeltaError, match="another run: --top_k was 4, now it is 3"):
        run(tiny_checkpoint, copy, top_k=3)
    with pytest.raises(JaxDeltaError, match="another run: text was"):
        run(tiny_checkpoint, copy, text(9))
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][5] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(JaxDeltaError, match="another run: weights was"):
        run(model, copy)
    assert run(tiny_checkpoint, copy)[1] == [f"resumed after layer {LAYERS - 2}"]


def test_a_model_of_another_place_is_the_same(copy: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "elsewhere"))
    assert run(model, copy)[1] == [f"resumed after layer {LAYERS - 2}"]


def test_a_manifest_that_cannot_be_read(copy: Path, tiny_checkpoint: Path) -> None:
    (copy / RUN / "manifest.json").write_text("{")
    with pytest.raises(JaxDeltaError, match=r"manifest\.json: cannot be read .*; choose another"):
        run(tiny_checkpoint, copy)


def test_without_a_manifest_nothing_counts(copy: Path, tiny_checkpoint: Path) -> None:
    """Whose steps these are is not known: of a run that was killed when it removed them, say."""
    (copy / RUN / "manifest.json").unlink()
    assert run(tiny_checkpoint, copy)[1] == []


def test_two_runs_at_once(copy: Path, tiny_checkpoint: Path) -> None:
    with locked(copy / RUN) as ours, pytest.raises(JaxDeltaError, match="another run is using it"):
        assert ours
        run(tiny_checkpoint, copy)


def test_no_directory(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JaxDeltaError, match=r"file: no checkpoint can be kept there \(.*\)"):
        run(tiny_checkpoint, tmp_path / "file")


def test_a_loaded_model_has_no_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="checkpoint_dir needs a model by its name"):
        analyze(load_model(str(tiny_checkpoint)), TEXT, checkpoint_dir=str(tmp_path))
    assert not [*tmp_path.iterdir()]


# ------------------------------------------------------------------------------------------------- damage


def restored(directory: Path) -> tuple[int, list[str], States]:
    """The layer to go on with, what is said, and the states."""
    said: list[str] = []
    states, kept = States("host"), Run(directory / RUN, LAYERS, said.append)
    start = kept.restore(states)
    kept.close()
    return start, said, states


def flip(file: Path, share: float) -> None:
    """Another bit in the midst of the file."""
    data = bytearray(file.read_bytes())
    data[int(share * (len(data) - 1))] ^= 16
    file.write_bytes(data)


def files_of(directory: Path, *names: str) -> list[Path]:
    found = [path for name in names for path in (directory / RUN).glob(f"{name}*")]
    return [
        path for top in found for path in [top, *top.rglob("*")] if path.is_file() and path.stat().st_size
    ]


def test_no_damage_passes(left: Path, tmp_path: Path) -> None:
    """Whatever file of the newest step is damaged: its states are found whole, or the step before's are."""
    newest, _, wanted = restored(Path(shutil.copytree(left, tmp_path / "whole")))
    assert newest == LAYERS - 1
    damages: list[Callable[[Path], Any]] = [
        lambda file: flip(file, 0.5),
        lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        Path.unlink,
    ]
    names = f"step-{LAYERS - 2:06}", f"record-{LAYERS - 2:06}"
    found = []
    for number in range(len(files_of(left, *names))):
        for damage in damages:
            copy = Path(shutil.copytree(left, tmp_path / "copy"))
            damage(file := files_of(copy, *names)[number])
            unsaid = file.suffix == ".json" and not file.exists()  # as of a run that was killed before
            start, said, states = restored(copy)
            found.append(start)
            assert start in (newest - 1, newest)
            assert said[-1] == f" resumed after layer {start - 1}"
            assert len(said) == (1 if unsaid else 1 + newest - start)
            if start == newest:
                for one, other in zip(*(next(iter(of)) for of in (states, wanted)), strict=True):
                    np.testing.assert_array_equal(one, other)
            shutil.rmtree(copy)
    assert set(found) == {newest - 1, newest}  # Orbax keeps some files that nobody needs


def test_the_step_before_is_used(copy: Path, tiny_checkpoint: Path) -> None:
    for file in files_of(copy, f"step-{LAYERS - 2:06}/"):
        flip(file, 0.5)
    found, said = run(tiny_checkpoint, copy)
    assert f"what was kept after layer {LAYERS - 2} is damaged" in said[0]
    assert "it is not used" in said[0]
    assert said[1:] == [f"resumed after layer {LAYERS - 3}"]
    assert bits(found) == bits(run(tiny_checkpoint, None)[0])


def test_nothing_whole_is_left(copy: Path, tiny_checkpoint: Path) -> None:
    shutil.rmtree(copy / RUN / "record-000000")
    found, said = run(tiny_checkpoint, copy)
    assert [line.split(" (")[0] for line in said] == [
        f"what was kept after layer {layer} is damaged" for layer in (LAYERS - 2, LAYERS - 3)
    ]
    assert bits(found) == bits(run(tiny_checkpoint, None)[0])
    assert not [*copy.iterdir()]


def test_a_step_that_was_being_removed(copy: Path) -> None:
    """Its states do not stay on disk."""
    (copy / RUN / f"step-{LAYERS - 3:06}.json").unlink()
    assert restored(copy)[0] == LAYERS - 1
    newest = f"step-{LAYERS - 2:06}"
    assert {path.name for path in (copy / RUN).glob("step-*")} == {newest, f"{newest}.json"}


def test_a_piece_that_cannot_be_written(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends in an error that names it, and no later step counts as whole."""
    save, calls = resume._save, []

    def fails(path: Path, arrays: Any) -> str:
        calls.append(path.name)
        if path.name == "record-000001":
            raise JaxDeltaError(f"{path}: cannot be written")
        return save(path, arrays)

    monkeypatch.setattr(resume, "_save", fails)
    with pytest.raises(JaxDeltaError, match=r"record-000001: cannot be written"):
        run(tiny_checkpoint, tmp_path)
    monkeypatch.undo()
    assert calls[-1] == "record-000001"
    assert run(tiny_checkpoint, tmp_path)[1] == ["resumed after layer 0"]


# ------------------------------------------------------------------------------------------------- pieces


def test_records_come_back(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bits, all types, and what is one object stays one."""
    for one in found_records(tiny_checkpoint, monkeypatch):
        other = record_files.unpack(record_files.pack(one))
        assert list(one.views) == list(other.views)
        assert one._replace(views={}) == other._replace(views={})
        same = [[a is b for a in of.views.values() for b in of.views.values()] for of in (one, other)]
        assert same[0] == same[1]
        for mine, its in zip(one.views.values(), other.views.values(), strict=True):
            assert_same_tree(mine, its)


def found_records(model: Path, monkeypatch: pytest.MonkeyPatch) -> list[LayerRecord]:
    """From rows, and from moments."""
    found: list[LayerRecord] = []
    collect = analysis.collect

    def listened(layers: list[LayerRecord], *rest: Any) -> Any:
        found.extend(layers)
        return collect(layers, *rest)

    monkeypatch.setattr(analysis, "collect", listened)
    run(model, None)
    in_blocks(monkeypatch, "host")
    run(model, None)
    assert len(found) == 2 * (LAYERS + 1)
    return found


def assert_same_tree(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            assert_same_tree(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, tuple):
        for mine, its in zip(one, other, strict=True):
            assert_same_tree(mine, its)
    else:
        assert one == other


def test_nothing_piles_up_in_scratch(tmp_path: Path) -> None:
    """What a killed run left is removed; what a living one has, and what is not ours, stays."""
    dead = tmp_path / "jaxdelta-scratch-dead"
    dead.mkdir()
    (dead / "state-0").write_bytes(b"left")
    (tmp_path / "jaxdelta-scratch-of the user").mkdir()
    (tmp_path / "jaxdelta-scratch-of the user" / "notes").touch()
    with scratch_directory(str(tmp_path), "scratch") as first:
        assert first is not None
        States("scratch", first)[0] = State(np.ones((1, 2, 3), np.float32), np.ones((1, 2, 3), np.float32))
        with scratch_directory(str(tmp_path), "scratch") as second:
            assert second is not None and second != first
            assert not dead.exists()
            assert (first / "state-0").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["jaxdelta-scratch-of the user"]


def test_weights_are_told_apart_by_every_tensor_of_a_small_file(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    before = weights_fingerprint(open_checkpoint(str(model)))
    flip(model / "model.safetensors", 0.7)
    assert weights_fingerprint(open_checkpoint(str(model))) != before
