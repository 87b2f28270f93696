"""Files of one run stay together: arrays and their digest, pages, links, `~`; equal runs are equal."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.report.analysis import Analysis
from jaxdelta.report.page import page_file
from jaxdelta.utils.files import check_output, write_together

# Equality


def test_a_run_equals_what_was_saved_of_it(analysed: Analysis, tmp_path: Path) -> None:
    analysed.save(tmp_path / "a.json")
    loaded = Analysis.load(tmp_path / "a.json")
    assert loaded == analysed and hash(loaded) == hash(analysed)
    assert len({loaded, analysed}) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"directions": lambda run: -run.directions},
        {"singular_values": lambda run: run.singular_values[:, :-1]},
        {"principal_cosines": lambda run: None},
        {"per_layer": lambda run: run.per_layer[::-1]},
        {"model": lambda run: "another"},
        {"run": lambda run: run.run | {"calibration_loss": 0.0}},
    ],
)
def test_runs_with_other_numbers_differ(
    analysed: Analysis, changed: dict[str, Callable[[Analysis], Any]]
) -> None:
    other = dataclasses.replace(analysed, **{name: change(analysed) for name, change in changed.items()})
    assert other != analysed and analysed != other


def test_times_and_other_types_in_a_comparison(analysed: Analysis) -> None:
    assert dataclasses.replace(analysed, run=analysed.run | {"seconds": {}}) == analysed
    assert analysed != "a run" and analysed is not None and analysed not in [None, 5]


# The digest


def test_the_digest_of_the_arrays_is_that_of_sha256sum(analysed: Analysis, tmp_path: Path) -> None:
    import hashlib

    analysed.save(tmp_path / "a.json")
    wanted = hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "a.json").read_text())["run"]["arrays_sha256"] == wanted


def test_arrays_of_another_run_are_refused(analysed: Analysis, tmp_path: Path) -> None:
    """As after copying one of two files, or a sync that was interrupted."""
    analysed.save(tmp_path / "a.json")
    dataclasses.replace(analysed, directions=-analysed.directions).save(tmp_path / "b.json")
    (tmp_path / "b.safetensors").replace(tmp_path / "a.safetensors")
    with pytest.raises(JaxDeltaError, match=r"a\.json: the arrays in a\.safetensors are not this run's"):
        Analysis.load(tmp_path / "a.json")


def test_a_file_without_a_digest_is_read(analysed: Analysis, tmp_path: Path) -> None:
    analysed.save(tmp_path / "a.json")
    fields = json.loads((tmp_path / "a.json").read_text())
    del fields["run"]["arrays_sha256"]
    (tmp_path / "a.json").write_text(json.dumps(fields))
    assert Analysis.load(tmp_path / "a.json") == analysed


# An earlier run's page


def test_an_earlier_page_does_not_stay(analysed: Analysis, tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    analysed.save(tmp_path / "a.json", {page: page_file(analysed)})
    assert page.exists()
    analysed.save(tmp_path / "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.safetensors"]
    page.write_text("<title>My notes on jaxdelta</title>")  # not ours
    analysed.save(tmp_path / "a.json")
    assert page.exists()


# Links


@pytest.mark.parametrize("there", [True, False], ids=["existing", "dangling"])
def test_a_link_stays_and_its_target_is_written(analysed: Analysis, tmp_path: Path, there: bool) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    store.mkdir(), out.mkdir()
    for name in ("a.json", "a.safetensors"):
        if there:
            (store / name).write_text("of an earlier run")
        (out / name).symlink_to(store / name)
    check_output(out / "a.json")
    analysed.save(out / "a.json")
    for name in ("a.json", "a.safetensors"):
        assert (out / name).is_symlink() and not (store / name).is_symlink()
    assert Analysis.load(store / "a.json") == Analysis.load(out / "a.json") == analysed
    assert sorted(path.name for path in store.iterdir()) == ["a.json", "a.safetensors"]


def test_a_relative_link_and_a_linked_directory(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to("real")
    (tmp_path / "linked" / "a").symlink_to("b")
    (tmp_path / "real" / "b").symlink_to("c")
    write_together({tmp_path / "linked" / "a": b"1"})
    assert (tmp_path / "real" / "c").read_bytes() == b"1"
    assert (tmp_path / "real" / "a").is_symlink() and (tmp_path / "real" / "b").is_symlink()


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    for name, target in (
        ("d", tmp_path),
        ("gone", tmp_path / "missing" / "a"),
        ("loop", tmp_path / "loop.json"),
    ):
        (tmp_path / f"{name}.json").symlink_to(target)
    before = sorted(tmp_path.iterdir())
    for name, said in (
        ("d", "is a directory"),
        ("gone", "missing: no such directory"),
        ("loop", "leads back to itself"),
    ):
        for action in (check_output, lambda path: write_together({path: b"1"})):
            with pytest.raises(JaxDeltaError, match=said if action is check_output else None):
                action(tmp_path / f"{name}.json")
    (tmp_path / "x").symlink_to("y")
    with pytest.raises(JaxDeltaError, match="two of these are links to one file"):
        write_together({tmp_path / "x": b"1", tmp_path / "y": b"2"})
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "x"])


# Paths and layers as users write them


def test_home_directories(analysed: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    analysed.save("~/a.json")
    assert Analysis.load("~/a.json") == analysed
    assert analysed.save_directions(Path("~/d.gguf"), layers=2) == tmp_path / "d.gguf"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.safetensors", "d.gguf"]


@pytest.mark.parametrize("path", [5, None, b"a.json", "", "a\0.json", ["a.json"]])
def test_what_is_no_path(analysed: Analysis, path: Any) -> None:
    for action in (analysed.save, Analysis.load, analysed.save_directions):
        with pytest.raises(UsageError, match="must be a path"):
            action(path)


@pytest.mark.parametrize("layers", [2, np.int64(2), [2], range(2, 3), np.array([2]), np.array(2), (2, 2)])
def test_directions_of_one_layer(analysed: Analysis, tmp_path: Path, layers: Any) -> None:
    analysed.save_directions(tmp_path / "d.safetensors", layers=layers, rank=np.int32(1))
    assert list(load_file(tmp_path / "d.safetensors")) == ["direction.2"]


@pytest.mark.parametrize(
    "given",
    [
        *({"layers": layers} for layers in ("2", 2.0, [1.5], True, [None], b"1", {"a": 1}, np.ones(2))),
        *({"rank": rank} for rank in ("1", None, 1.5, True, [1, 2], [], 10**30)),
        {"rank": 99, "scale": "rms"},
        {"layers": 10**30},
        {"scale": "x"},
    ],
)
def test_directions_that_there_are_not(analysed: Analysis, tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"(layers|rank|scale):? "):
        analysed.save_directions(tmp_path / "d.safetensors", **given)
