"""The inputs of a run, fixed before its first layer."""

import dataclasses
from typing import NamedTuple

from jaxdelta.checkpoint.weights import Weights
from jaxdelta.run.memory_plan import Plan
from jaxdelta.run.options import Options
from jaxdelta.statistics.across_layers.phases import Phases
from jaxdelta.sweep.mesh import Devices
from jaxdelta.text.groups import ResamplingGroups
from jaxdelta.utils.timing import Stages


class Identity(NamedTuple):
    """Digests of the weights and of the text, both before a control changes them."""

    weights: str
    text: str


@dataclasses.dataclass(frozen=True)
class RunContext:
    """The inputs of a run.

    `original` are the weights before a control changes them, `identity` their digest and the text's; `notes`
    what a user should know of how model and text were read, a sentence each.
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
    identity: Identity
    notes: tuple[str, ...] = ()
