"""The rooms of the package import in one direction, and no module is in a circle."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import jaxdelta

PACKAGE = Path(jaxdelta.__file__).parent
# From the ground up: a room imports from those before it. Rooms on one floor do not import each other.
FLOORS = (
    ("_faces", "_version", "errors"),
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
FACES = [
    "jaxdelta",
    *(f"jaxdelta.{room}" for room in ("utils", "text", "model", "checkpoint", "sweep", "spectra")),
    *(f"jaxdelta.{room}" for room in ("spectra.moments", "statistics", "report", "run")),
    *(f"jaxdelta.statistics.{room}" for room in ("per_layer", "across_layers")),
]


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
        if target.rpartition(".")[2].startswith("_")
        and room(target) not in (room(name), "_faces", "_version")
    ]
    assert outside == []


@pytest.mark.parametrize("name", FACES)
def test_every_name_of_a_face_resolves(name: str) -> None:
    package = import_module(name)
    assert 3 <= len(package.__all__) <= 7
    for public in package.__all__:
        assert getattr(package, public) is not None
        assert f"{name}.{public}" not in modules(), "hidden by the module of that name"
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'absent'"):
        _ = package.absent


def test_faces_bring_no_library_along() -> None:
    faces = [name for name in FACES if name != "jaxdelta.statistics.per_layer"]  # imports its modules
    code = f"import sys, {', '.join(faces)}; print({{*sys.modules}} & {{'absl', 'jax', 'numpy'}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
