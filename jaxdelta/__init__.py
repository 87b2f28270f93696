"""jaxdelta: what each layer of a language model writes into its residual stream."""

from typing import TYPE_CHECKING

from jaxdelta._faces import face
from jaxdelta._version import __version__ as __version__

if TYPE_CHECKING:
    from jaxdelta.checkpoint.checkpoint import load_model as load_model
    from jaxdelta.errors import JaxDeltaError as JaxDeltaError
    from jaxdelta.errors import UsageError as UsageError
    from jaxdelta.model.decoder import residual_stream as residual_stream
    from jaxdelta.report.analysis import Analysis as Analysis
    from jaxdelta.run.analyze import analyze as analyze

# Imported on first use: JAX takes a second that a wrong flag need not wait for.
__all__, __getattr__, __dir__ = face(
    __name__,
    Analysis="report.analysis",
    JaxDeltaError="errors",
    UsageError="errors",
    __version__="_version",
    analyze="run.analyze",
    load_model="checkpoint.checkpoint",
    residual_stream="model.decoder",
)
