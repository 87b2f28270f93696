"""Prints the flags of the given scripts as JSON, for the page of commands.

All in one process, since what the scripts import takes seconds: each is run up to where it would begin, and
its flags are taken away again before the next one, which may define others by the same names.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

from absl import app, flags  # noqa: F401  absl's own flags are no script's: they are there before


def flags_of(script: Path) -> list[dict[str, Any]]:
    """The flags that a script and those it imports define, with default, meaning and choices."""
    before, beside = set(flags.FLAGS), {path.stem for path in script.parent.glob("*.py")}
    names = runpy.run_path(str(script), run_name=script.stem)
    if "define_flags" in names:  # not at import, so that tests can import several scripts
        names["define_flags"]()
    found = [flags.FLAGS[name] for name in sorted(set(flags.FLAGS) - before)]
    for flag in found:
        delattr(flags.FLAGS, flag.name)
    for module in beside & set(sys.modules):  # to be imported, and so defined, again
        del sys.modules[module]
    return [
        {
            "name": flag.name,
            "default": (flag.default_as_str or "").strip("'"),
            "help": flag.help,
            "choices": getattr(flag.parser, "enum_values", None),
        }
        for flag in found
    ]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(sys.argv[1]).parent))
    print(json.dumps({script: flags_of(Path(script)) for script in sys.argv[1:]}))
