"""Whether two runs have the same statistics: all of their JSON files but `run`, which describes the run.

    python tests/same_statistics.py EXPECTED.json FOUND.json --tolerance=1e-5

Numbers differ by |found - expected| / max(1, |expected|). The ends of an interval, which are quantiles of
random draws, may differ ten times as much. The exit status is 1 where something differs by
more than the tolerance.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

INTERVAL_FACTOR = 10.0


def differences(expected: Any, found: Any, place: str = "") -> Iterator[tuple[float, str]]:
    """The difference of every two entries, with its place; infinite where they cannot be compared."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            if key in expected and key in found:
                yield from differences(expected[key], found[key], f"{place}.{key}")
            else:
                yield math.inf, f"{place}.{key}"
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, pair in enumerate(zip(expected, found, strict=True)):
            yield from differences(*pair, f"{place}[{index}]")
    else:
        yield _difference(expected, found) / (INTERVAL_FACTOR if "interval" in place else 1.0), place


def _difference(expected: Any, found: Any) -> float:
    if expected == found:
        return 0.0
    if isinstance(expected, float) and isinstance(found, float):
        difference = abs(found - expected) / max(1.0, abs(expected))
        return difference if math.isfinite(difference) else math.inf
    return math.inf


def main(arguments: Sequence[str]) -> int:
    """Prints the largest difference and what exceeds the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("expected", type=Path)
    parser.add_argument("found", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    given = parser.parse_args(arguments)
    expected, found = (json.loads(path.read_text(encoding="utf-8")) for path in (given.expected, given.found))
    for report in (expected, found):
        report.pop("run", None)
    ordered = sorted(differences(expected, found), reverse=True)
    beyond = [f"{place}: {difference:.2e}" for difference, place in ordered if difference > given.tolerance]
    print(f"{len(ordered)} entries compared, largest difference {ordered[0][0]:.1e} at {ordered[0][1]}")
    for line in beyond[:20]:
        print(f"  {line}", file=sys.stderr)
    return int(bool(beyond))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
