"""Statistics of a single layer. Importing the package imports all its modules, which register theirs."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
