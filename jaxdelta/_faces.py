"""Public names of a package, each imported from its module when it is first used."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def face(package: str, **modules: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` of a package, from public name -> module of the package."""

    def attribute(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return list(modules), attribute, lambda: sorted({*vars(sys.modules[package]), *modules})
