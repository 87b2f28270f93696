"""Random checkpoints from `strategies`: computed as by transformers, or refused in a sentence."""

import os
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
from families import TOLERANCE, relative, stream_of
from hypothesis import HealthCheck, Phase, event, given, settings
from strategies import Example, checkpoints, truth

from jaxdelta.checkpoint.checkpoint import load_model
from jaxdelta.errors import JaxDeltaError
from jaxdelta.model.decoder import residual_stream

EXAMPLES = int(os.environ.get("JAXDELTA_EXAMPLES", "100"))
TOKENS = np.random.default_rng(0).integers(0, 128, (1, 90), dtype=np.int32)  # beyond the original range


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
@given(checkpoints())
def test_a_checkpoint_equals_transformers_or_is_refused(example: Example) -> None:
    scratch = Path(tempfile.mkdtemp())
    try:
        model = load_model(str(example.write(scratch / "model")))
    except JaxDeltaError as error:
        assert len(str(error).splitlines()) <= 5 and len(str(error)) <= 800
        assert not example.plain, error
        event("refused")
        return
    finally:
        shutil.rmtree(scratch)
    theirs = truth(example)
    assert theirs is not None, "transformers computes no such model"
    event("equal")
    with jax.disable_jit():  # operation by operation: each configuration would compile anew
        found = residual_stream(model, TOKENS)
    wanted, _ = stream_of(theirs, TOKENS)
    for ours, other in zip(found.states, wanted.states, strict=True):
        assert relative(ours, other) <= TOLERANCE
