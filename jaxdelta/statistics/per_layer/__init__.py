"""Statistics of a single layer. Importing the package imports all its modules, which register theirs."""

import importlib
import pkgutil

from jaxdelta._faces import face

__all__, __getattr__, __dir__ = face(
    __name__, Statistic="registry", registered="registry", shown="registry", statistic="registry"
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
