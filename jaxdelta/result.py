"""Analysis: the result of a run, its two files, and how they are read back."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from jaxdelta.errors import JaxDeltaError
from jaxdelta.files import json_path, write_together

SCHEMA_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The figures of one run: the JSON's entries by their names, then the arrays of the safetensors file.

    `per_layer[L]` holds layer L's figures as the reference names them, and its other views' under their
    names. `last_layer_normed` and `last_layer_residual` are the last layer's row with the last state after
    and before the final norm. `overlap` holds, by view, what relates the layers, with nulls and intervals;
    `verdict` what that says of the hypothesis; `control` a control's figures, see
    `compare_control`; `text` excerpts from the text, see `excerpt`. What a file of an
    older version lacks is None.
    """

    model: str
    num_layers: int
    hidden: int
    n_calib_tokens: int
    per_layer: list[dict[str, Any]]
    top1_cos_adjacent: list[float]
    phase_overlap: list[dict[str, Any]]
    block_capture: list[dict[str, Any]]
    last_layer_normed: dict[str, Any]
    last_layer_residual: dict[str, Any]
    run: dict[str, Any]
    directions: Float32[np.ndarray, "N k d"] = dataclasses.field(repr=False)
    singular_values: Float32[np.ndarray, "N r"] = dataclasses.field(repr=False)
    top1_cos: Float32[np.ndarray, "N N"] = dataclasses.field(repr=False)
    schema_version: int = SCHEMA_VERSION
    overlap: dict[str, dict[str, Any]] | None = None
    verdict: list[dict[str, Any]] | None = None
    control: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    principal_cosines: Float32[np.ndarray, "N N k"] | None = dataclasses.field(default=None, repr=False)
    projection_distance: Float32[np.ndarray, "N N"] | None = dataclasses.field(default=None, repr=False)
    grassmann_distance: Float32[np.ndarray, "N N"] | None = dataclasses.field(default=None, repr=False)

    ARRAYS = (
        "directions",
        "singular_values",
        "top1_cos",
        "principal_cosines",
        "projection_distance",
        "grassmann_distance",
    )

    def save(self, path: str | Path, more: Mapping[Path, bytes] | None = None) -> list[Path]:
        """Writes `path` (.json) and, beside it, .safetensors with the arrays: both, or neither.

        Args:
            path: the JSON's name.
            more: other files and what is in them, which appear with these two or not at all.

        Returns:
            What was written.

        Raises:
            UsageError: the name does not end in .json.
            JaxDeltaError: a file cannot be written.
        """
        path = json_path(path)
        fields = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.ARRAYS
        }
        text = json.dumps(fields, indent=1, allow_nan=False) + "\n"
        beside, more = path.with_suffix(".safetensors"), more or {}
        # The JSON is renamed last: where it is, the others are.
        write_together({**more, beside: self.arrays_file(), path: text.encode()})
        return [path, beside, *more]

    def arrays_file(self) -> bytes:
        """What the .safetensors file holds: the same run gives the same bytes."""
        held = {name: getattr(self, name) for name in self.ARRAYS}
        arrays = {name: np.ascontiguousarray(array) for name, array in held.items() if array is not None}
        return save(arrays, {"schema_version": str(self.schema_version)})

    @classmethod
    def load(cls, path: str | Path) -> "Analysis":
        """Reads what `save` wrote.

        Raises:
            JaxDeltaError: a file is missing or damaged, or was written by a newer version.
        """
        path = Path(path)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            version = fields.get("schema_version", 0)
            if version > SCHEMA_VERSION:
                raise JaxDeltaError(
                    f"{path}: has schema_version {version}, this jaxdelta reads up to {SCHEMA_VERSION}"
                )
            arrays: dict[str, Any] = load_file(path.with_suffix(".safetensors"))
            return cls(**fields, **arrays)
        except OSError as error:
            raise JaxDeltaError(f"{path}: cannot be read ({error})") from error
        except (ValueError, TypeError, AttributeError, SafetensorError) as error:
            raise JaxDeltaError(f"{path}: is not an analysis ({error})") from error

    def to_frame(self) -> Any:
        """The rows of `per_layer` as a pandas DataFrame indexed by layer; pandas is imported only here."""
        import pandas

        return pandas.DataFrame(self.per_layer).set_index("L")
