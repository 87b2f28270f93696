"""The Hugging Face hub, for models and data sets alike: ids, a common error, no log messages."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?", re.ASCII)  # owner/name, or an old model's name alone
GATED = "{}: is gated; accept its terms on the hub, then log in with `hf auth login`"


@contextlib.contextmanager
def silent(*loggings: Any) -> Iterator[None]:
    """Silences libraries, given by their `logging` modules: they log each retry before they raise."""
    before = [logging.get_verbosity() for logging in loggings]
    for logging in loggings:
        logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for logging, verbosity in zip(loggings, before, strict=True):
            logging.set_verbosity(verbosity)
