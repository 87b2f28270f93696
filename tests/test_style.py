"""The size of what the package is made of: parameters of a function, lines of a function, lines of a file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import jaxdelta

PACKAGE = Path(jaxdelta.__file__).parent
MOST_PARAMETERS, MOST_LINES, MOST_LINES_OF_A_FILE = 6, 60, 400
# Functions that take more parameters, each with its reason; at most five.
MORE_PARAMETERS = {
    "run/analyze.py: analyze": "its **options are those of a run, which a user gives by name",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    """All functions and methods, those within others too, by file and name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function):
                yield f"{path.relative_to(PACKAGE).as_posix()}: {node.name}", node


def parameters(function: Function) -> list[str]:
    """The names a caller gives, without an object's or a class's own."""
    given = function.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [arg.arg for arg in every if arg is not None and arg.arg not in ("self", "cls")]


def test_no_function_has_many_parameters() -> None:
    many = {name for name, function in functions() if len(parameters(function)) > MOST_PARAMETERS}
    assert many == MORE_PARAMETERS.keys()
    assert len(MORE_PARAMETERS) <= 5


def test_no_function_is_long() -> None:
    lengths = {name: (function.end_lineno or 0) - function.lineno + 1 for name, function in functions()}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_file_is_long() -> None:
    lengths = {path.relative_to(PACKAGE).as_posix(): _lines(path) for path in PACKAGE.rglob("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES_OF_A_FILE} == {}


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())
