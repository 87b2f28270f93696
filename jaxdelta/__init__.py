"""jaxdelta: what each layer of a language model writes into its residual stream."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxdelta._version import __version__

if TYPE_CHECKING:
    from jaxdelta.checkpoint.checkpoint import load_model
    from jaxdelta.errors import JaxDeltaError, UsageError
    from jaxdelta.model.decoder import residual_stream
    from jaxdelta.report.analysis import Analysis
    from jaxdelta.run.analyze import analyze

_HOMES = {
    "Analysis": "jaxdelta.report.analysis",
    "JaxDeltaError": "jaxdelta.errors",
    "UsageError": "jaxdelta.errors",
    "analyze": "jaxdelta.run.analyze",
    "load_model": "jaxdelta.checkpoint.checkpoint",
    "residual_stream": "jaxdelta.model.decoder",
}
__all__ = [
    "Analysis",
    "JaxDeltaError",
    "UsageError",
    "__version__",
    "analyze",
    "load_model",
    "residual_stream",
]


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used: JAX takes a second that a wrong flag need not."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jaxdelta' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What a notebook offers to complete."""
    return sorted({*globals(), *__all__})
