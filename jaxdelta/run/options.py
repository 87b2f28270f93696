"""The options of a run: flags of the command `jaxdelta`, keyword arguments of `analyze`."""

import dataclasses
import difflib
import math
import numbers
import operator
import os
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from jaxdelta.checkpoint.checkpoint import LOADERS
from jaxdelta.checkpoint.controls import CONTROLS
from jaxdelta.errors import UsageError
from jaxdelta.model.families.inert_keys import key_names
from jaxdelta.run.memory_plan import MODES
from jaxdelta.spectra.spectrum import METHODS
from jaxdelta.spectra.views import DEFAULT_SINK_FACTOR, DEFAULT_VIEWS, parse_views
from jaxdelta.sweep.mesh import parse_mesh
from jaxdelta.text.documents import DEFAULT_SPLIT, DEFAULT_TEXT_KEY
from jaxdelta.text.measure import ALL, check_measure
from jaxdelta.text.messages import CHATS
from jaxdelta.text.windows import DEFAULT_MAX_TOKENS, DEFAULT_SEQ_LEN, LAYOUTS

DTYPES = ("float32", "bfloat16")
CHOICES = {
    "layout": LAYOUTS,
    "chat": CHATS,
    "last_state": ("residual", "normed"),
    "svd": METHODS,
    "compute_dtype": DTYPES,
    "residual_dtype": DTYPES,
    "loader": LOADERS,
    "memory": MODES,
    "control": (None, *CONTROLS),
}
MIN_DRAWS = 20  # fewer resampling draws have meaningless quantiles


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a run; each field is the flag of the same name.

    Raises:
        UsageError: an impossible value.
    """

    top_k: int = 8
    max_tokens: int = DEFAULT_MAX_TOKENS
    layout: str = "stream"
    seq_len: int = DEFAULT_SEQ_LEN
    text_key: str = DEFAULT_TEXT_KEY
    ids_key: str | None = None
    split: str = DEFAULT_SPLIT
    dataset_config: str | None = None
    shuffle: bool = False
    chat: str = "auto"
    measure: str = ALL
    tokenizer: str | None = None
    last_state: str = "residual"
    svd: str = "gram"
    compute_dtype: str = "float32"
    residual_dtype: str = "float32"
    phases: str | None = None
    revision: str | None = None
    loader: str = "auto"
    ignore_config_keys: str | None = None
    adapter: str | None = None
    memory: str = "auto"
    device_memory_gb: float | None = None
    views: str = DEFAULT_VIEWS
    sink_factor: float = DEFAULT_SINK_FACTOR
    bootstrap: int = 200
    null_draws: int = 200
    seed: int = 0
    control: str | None = None
    scratch: str | None = None
    keep_moments: str | None = None
    checkpoint_dir: str | None = None
    mesh: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Options":
        """Options from a caller's keyword arguments.

        Raises:
            UsageError: an unknown name, a value of the wrong type, or an impossible value.
        """
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        values = {}
        for name, value in given.items():
            if name not in fields:
                near = difflib.get_close_matches(name, fields, 1)
                raise UsageError(f"no option {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
            values[name] = _plain(name, value, fields[name])
        return cls(**values)

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"{name} must be one of {', '.join(map(str, allowed))}, not {getattr(self, name)!r}"
                )
        for name, least in (("top_k", 1), ("max_tokens", 2), ("seq_len", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.device_memory_gb is not None and not self.device_memory_gb > 0:
            raise UsageError(f"device_memory_gb must be above 0, not {self.device_memory_gb}")
        if not self.sink_factor > 1:
            raise UsageError(f"sink_factor must be above 1, not {self.sink_factor}")
        for name in ("bootstrap", "null_draws"):
            if (value := getattr(self, name)) != 0 and value < MIN_DRAWS:
                raise UsageError(f"{name} must be 0 (none) or at least {MIN_DRAWS}, not {value}")
        key_names(self.ignore_config_keys)
        check_measure(self.measure)
        parse_views(self.views)
        if self.mesh is not None:
            parse_mesh(self.mesh)

    @property
    def resampled(self) -> bool:
        """Whether intervals or nulls are computed."""
        return self.bootstrap > 0 or self.null_draws > 0


def _plain(name: str, value: Any, kind: Any) -> Any:
    """An option's value in JSON's types: NumPy's numbers and paths are converted.

    Raises:
        UsageError: it has another type.
    """
    kinds = get_args(kind) or (kind,)
    is_bool = isinstance(value, bool | np.bool_)
    if value is None and type(None) in kinds:
        return None
    if is_bool and bool in kinds:
        return bool(value)
    if isinstance(value, str | os.PathLike) and str in kinds:
        text = os.fspath(value)
        if isinstance(text, str) and "\0" not in text:
            return str(text)
    elif not is_bool and not getattr(value, "ndim", 0):
        if int in kinds and hasattr(value, "__index__"):
            return operator.index(value)
        if float in kinds and isinstance(value, numbers.Real) and math.isfinite(value):
            return float(value)
    raise UsageError(f"{name} must be {getattr(kind, '__name__', kind)}, not {value!r:.80}")


def check_rank(options: Options, tokens: int, hidden: int) -> None:
    """Refuses more directions than an update of these `tokens` can have."""
    if options.top_k > (rank := min(tokens, hidden)):
        few = f": {tokens} tokens count with measure={options.measure}" if options.measure != ALL else ""
        raise UsageError(f"top_k={options.top_k} is larger than the rank {rank} of a layer's update{few}")
