"""The inputs of a run, fixed before its first layer."""

import dataclasses

from jaxdelta.checkpoint.weights import Weights
from jaxdelta.run.memory_plan import Plan
from jaxdelta.run.options import Options
from jaxdelta.statistics.across_layers.phases import Phases
from jaxdelta.sweep.mesh import Devices
from jaxdelta.text.groups import ResamplingGroups
from jaxdelta.utils.timing import Stages


@dataclasses.dataclass(frozen=True)
class RunContext:
    """The inputs of a run.

    `original` are the weights before a control changes them; `notes` what a user should know of how model and
    text were read, a sentence each.
    """

    name: str
    weights: Weights
    original: Weights
    sample: ResamplingGroups
    phases: Phases
    options: Options
    stages: Stages
    devices: Devices
    plan: Plan
    notes: tuple[str, ...] = ()
