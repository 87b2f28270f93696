"""Prints every command with its flags as JSON, for the page of commands.

One process handles all, since the imports take seconds: a command's flags are removed before the next one's.
"""

import ast
import dataclasses
import json
import runpy
import tomllib
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from absl import flags

from jaxdelta.utils.command import Option

ROOT = Path(__file__).resolve().parent.parent


def command(name: str, module: str) -> dict[str, Any]:
    """A command that the wheel installs, and the script that calls it."""
    imported = import_module(module)
    called = f"from {module} import main"
    (script,) = (path for path in sorted((ROOT / "scripts").glob("*.py")) if called in path.read_text())
    return {
        "name": name,
        "script": script.name,
        "about": imported.COMMAND.about,
        "flags": taken(imported.COMMAND.define(), imported.COMMAND.required),
    }


def script(path: Path) -> dict[str, Any]:
    """A script that is not a command."""
    before = set(flags.FLAGS)
    runpy.run_path(str(path), run_name=path.stem)["define_flags"]()
    names = [name for name in flags.FLAGS if name not in before]
    about = ast.get_docstring(ast.parse(path.read_text()))
    return {"name": path.name, "script": None, "about": about, "flags": taken({"Options": names}, ())}


def taken(
    headings: Mapping[str, Sequence[str]], required: Collection[str]
) -> dict[str, list[dict[str, Any]]]:
    """Describes the flags under each heading, and removes them."""
    described: dict[str, list[dict[str, Any]]] = {}
    for heading, names in headings.items():
        described[heading] = []
        for name in names:
            described[heading].append(dataclasses.asdict(Option.of(name)) | {"required": name in required})
            delattr(flags.FLAGS, name)
    return described


if __name__ == "__main__":
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    commands = [command(name, target.removesuffix(":main")) for name, target in entries.items()]
    others = [
        path for path in sorted((ROOT / "scripts").glob("*.py")) if "def define_flags" in path.read_text()
    ]
    print(json.dumps([*commands, *map(script, others)]))
