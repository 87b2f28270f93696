"""Where a run's time goes."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by what they were spent on; what several threads do at once counts for each of them."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Adds the time spent inside."""
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start


class Stages:
    """Seconds by stage; tells the listener a line as each ends."""

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
