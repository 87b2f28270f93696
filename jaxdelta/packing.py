"""Pieces of text into windows of one length, with hardly any room left over."""

from bisect import bisect_left, insort

import numpy as np
from jaxtyping import Int


def best_fit(
    sizes: Int[np.ndarray, " n"], capacity: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The window of every piece, and the place in it where the piece begins.

    Best fit decreasing: the longest piece first, each into the window that has least room left for it. Takes
    at most 11/9 of the fewest windows possible, and a few more (Johnson et al. 1974, SIAM J. Comput. 3, 299).

    Args:
        sizes: of the pieces, each 1 to `capacity`.
        capacity: of a window.
    """
    windows, places = np.zeros_like(sizes), np.zeros_like(sizes)
    rooms: list[tuple[int, int]] = []  # what is left in a window, and which; the fullest first
    count = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        if (fitting := bisect_left(rooms, (size, 0))) < len(rooms):
            room, window = rooms.pop(fitting)
        else:
            room, window = capacity, count
            count += 1
        windows[piece], places[piece] = window, capacity - room
        if room > size:
            insort(rooms, (room - size, window))
    return windows, places
