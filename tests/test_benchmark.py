"""The benchmarks' machinery, but no timing: order of the sides, ratios, commands, an older commit's tree."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(next(ROOT.glob("*/benchmark_timing")).parent))

from benchmark_timing.comparison import compared, in_turn  # noqa: E402
from benchmark_timing.processes import cost_of, environment, script  # noqa: E402
from benchmark_timing.worktree import commit_hash, worktree  # noqa: E402

from jaxdelta.errors import JaxDeltaError, UsageError  # noqa: E402


def git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits, in which `version` is `old` and `new`."""
    directory = tmp_path / "repository"
    directory.mkdir()
    git(directory, "init", "--quiet")
    for version in ("old", "new"):
        (directory / "version").write_text(version)
        git(directory, "add", "version")
        git(directory, "commit", "--quiet", "--message", version)
    return directory


@pytest.mark.parametrize("warm_up", [True, False])
def test_sides_run_in_turn(warm_up: bool) -> None:
    called: list[str] = []

    def side(name: str) -> Callable[[], int]:
        return lambda: called.append(name) or len(called)  # type: ignore[func-returns-value]

    found = in_turn({"a": side("a"), "b": side("b")}, 2, warm_up=warm_up)
    assert "".join(called) == ("ababab" if warm_up else "abab")
    assert found == ({"a": [3, 5], "b": [4, 6]} if warm_up else {"a": [1, 3], "b": [2, 4]})


def test_the_ratio_is_of_medians_and_each_round_has_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    found = compared("both", {"first": [1.0, 4.0, 2.0], "second": [4.0, 4.0, 10.0]})
    assert found["ratio"] == 2.0
    assert found["paired_ratios"] == [4.0, 1.0, 5.0]
    assert (found["seconds"], found["seconds_beside"]) == ([1.0, 4.0, 2.0], [4.0, 4.0, 10.0])
    printed = capsys.readouterr().out
    assert "ratio 2.000   (paired 4.000, 1.000, 5.000)" in printed
    peaks = compared("both", {"first": [1.0], "second": [1.5]}, "GB")
    assert peaks["gigabytes"] == {"first": [1.0], "second": [1.5]}


def test_a_worktree_is_there_only_inside(repository: Path, tmp_path: Path) -> None:
    with worktree(repository, "HEAD~1", tmp_path / "older") as tree:
        assert (tree / "version").read_text() == "old"
        assert (repository / "version").read_text() == "new"
    assert not tree.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), JaxDeltaError("no")])
def test_an_interrupted_worktree_is_removed(error: BaseException, repository: Path, tmp_path: Path) -> None:
    with pytest.raises(type(error)), worktree(repository, "HEAD~1", tmp_path / "older") as tree:
        (tree / "version").write_text("changed")
        (tree / "untracked").write_text("left by a run")
        raise error
    assert not (tmp_path / "older").exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize("commit", ["nothing", "--all", "HEAD:version"])
def test_what_is_no_commit_is_said(commit: str, repository: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"against: '{commit}' is not a commit of"):
        commit_hash(repository, commit)
    with pytest.raises(UsageError), worktree(repository, commit, tmp_path / "older"):
        pass
    assert commit_hash(repository, "HEAD") == git(repository, "rev-parse", "HEAD")


def test_a_tree_is_measured_with_its_own_package_and_cache(tmp_path: Path) -> None:
    """The package of a tree comes before the one that is installed."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "jaxdelta").mkdir()
    (tmp_path / "jaxdelta" / "__init__.py").write_text("")
    out = tmp_path / "out"
    (tmp_path / "scripts" / "a.py").write_text(
        "import os, sys, jaxdelta\n"
        "open(sys.argv[1], 'w').write(jaxdelta.__file__ + ' ' + os.environ['XDG_CACHE_HOME'])\n"
    )
    command = script("a.py", [str(out)], tmp_path)
    assert command == [sys.executable, str(tmp_path / "scripts" / "a.py"), str(out)]
    env = environment(tmp_path, tmp_path / "cache")
    cost = cost_of(command, env)
    assert out.read_text() == f"{tmp_path}/jaxdelta/__init__.py {tmp_path}/cache"
    assert cost.seconds > 0
    assert env.keys() - os.environ.keys() <= {"PYTHONPATH", "XDG_CACHE_HOME"}


def test_a_script_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "a.py").write_text("raise SystemExit('first line\\nthe reason')\n")
    with pytest.raises(JaxDeltaError, match=r"a\.py failed: the reason"):
        cost_of(script("a.py", [], tmp_path))


def test_the_interrupted_process_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(process: subprocess.Popen[bytes]) -> int:
        processes.append(process)
        raise KeyboardInterrupt

    processes: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr("benchmark_timing.processes._peak", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cost_of([sys.executable, "-c", "import time; time.sleep(100)"])
    assert processes[0].returncode == -9


def test_against_needs_a_commit() -> None:
    command = [sys.executable, next(ROOT.glob("*/benchmark.py")), "against"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == ("benchmark.py: against: name the older commit, as in --against=HEAD~1")
