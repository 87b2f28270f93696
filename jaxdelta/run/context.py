"""What is fixed before the first layer of a run."""

import dataclasses

from jaxdelta.checkpoint.weights import Weights
from jaxdelta.run.memory_plan import Plan
from jaxdelta.run.options import Options
from jaxdelta.spectra.views import View, parse_views
from jaxdelta.statistics.across_layers.phases import Phases
from jaxdelta.sweep.mesh import Devices
from jaxdelta.text.groups import ResamplingGroups
from jaxdelta.utils.timing import Stages


@dataclasses.dataclass(frozen=True)
class RunContext:
    """All that is fixed before the first layer; `original` are the weights before a control changes them."""

    name: str
    weights: Weights
    original: Weights
    sample: ResamplingGroups
    phases: Phases
    options: Options
    stages: Stages
    devices: Devices
    plan: Plan | None = None

    @property
    def views(self) -> tuple[View, ...]:
        """The views that are measured."""
        return parse_views(self.options.views)
