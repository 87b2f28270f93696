"""The seconds that a run spends on each of its tasks."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by task, summed over threads."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, task: str) -> Iterator[None]:
        """Adds the time spent in the block."""
        start = time.perf_counter()
        yield
        self.seconds[task] += time.perf_counter() - start


class Stages:
    """Seconds by stage, reported to the listener in one line at the end of each."""

    def __init__(self, listener: Callable[[str], None] | None = None):
        self.clock = Clock()
        self.listener = listener or (lambda line: None)

    @contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[str], None]]:
        """Yields a function that adds a note to the stage's line."""
        notes: list[str] = []
        with self.clock(name):
            yield notes.append
        self.listener(f" {name:<10}{self.clock.seconds[name]:7.2f} s   {', '.join(notes)}".rstrip())
