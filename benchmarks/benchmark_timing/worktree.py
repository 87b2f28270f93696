"""A temporary checkout of an older commit."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from jaxdelta.errors import UsageError


def commit_hash(repository: Path, commit: str) -> str:
    """The full hash of a commit, a branch or a tag.

    Raises:
        UsageError: the repository has no such commit.
    """
    found = _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}")
    if found.returncode:
        raise UsageError(f"against: {commit!r} is not a commit of {repository}")
    return found.stdout.strip()


@contextlib.contextmanager
def worktree(repository: Path, commit: str, directory: Path) -> Iterator[Path]:
    """A git worktree of the commit in `directory`, removed at the end, also after an interruption.

    Raises:
        UsageError: the repository has no such commit, or git cannot check it out.
    """
    wanted = commit_hash(repository, commit)
    try:
        added = _git(repository, "worktree", "add", "--detach", str(directory), wanted)
        if added.returncode:
            raise UsageError(f"against: git worktree: {added.stderr.strip().splitlines()[-1]}")
        yield directory
    finally:
        # Twice, as git locks a worktree until it is complete.
        _git(repository, "worktree", "remove", "--force", "--force", str(directory))


def _git(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True)
