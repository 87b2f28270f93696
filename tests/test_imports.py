"""The rooms of the package import in one direction, and no module is in a circle."""

import ast
import functools
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import jaxdelta

PACKAGE = Path(jaxdelta.__file__).parent
# From the ground up: a room imports from those before it. Rooms on one floor do not import each other.
FLOORS = (
    ("_version", "errors"),
    ("utils",),
    ("text", "model"),
    ("checkpoint",),
    ("sweep",),
    ("spectra",),
    ("statistics",),
    ("report",),
    ("run",),
    ("commands",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FACE = PACKAGE / "__init__.py"  # imports the public names when they are first used


@functools.cache
def modules() -> dict[str, Path]:
    """Every module by its name; a package goes by its folder's."""
    names = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in sources()}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def sources() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path != FACE]


def imported(path: Path, *, whole: bool = True) -> Iterator[str]:
    """The package's modules that a file imports: also inside functions, unless only the `whole` counts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if whole else tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jaxdelta":
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in modules() else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "jaxdelta")


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_a_floor_and_there_are_few() -> None:
    assert {room(name) for name in modules()} <= FLOOR.keys()
    assert len([path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]) <= 10


def test_no_import_climbs() -> None:
    climbing = [
        f"{name} -> {target}"
        for name, path in modules().items()
        for target in imported(path)
        if room(target) != room(name) and FLOOR[room(target)] >= FLOOR[room(name)]
    ]
    assert climbing == []


def test_no_module_is_in_a_circle() -> None:
    graph = {name: set(imported(path, whole=False)) for name, path in modules().items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_private_modules_stay_in_their_room() -> None:
    outside = [
        f"{name} -> {target}"
        for name, path in modules().items()
        for target in imported(path)
        if target.rpartition(".")[2].startswith("_") and room(target) not in (room(name), "_version")
    ]
    assert outside == []
