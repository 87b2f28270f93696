"""Analysis: the result of a run, its two files, and how they are read back."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from jaxdelta.errors import JaxDeltaError, UsageError, extra
from jaxdelta.report import steering
from jaxdelta.spectra.views import ALL, view_of
from jaxdelta.statistics.per_layer.registry import registered
from jaxdelta.utils.files import json_path, write_together

SCHEMA_VERSION = 2

AnyResult = TypeVar("AnyResult", bound="Result")


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """The figures of one run: the JSON's entries by their names, then the arrays of the safetensors file.

    Of N layers of hidden size d, with k = `top_k` directions kept; every key is defined in
    docs/definitions.md. What a file of an older version lacks is None.

    Examples:
        >>> run
        <Analysis of 'demo': 28 layers, hidden size 128, 100 tokens>
        >>> run.directions.shape  # (N, k, d)
        (28, 8, 128)
        >>> round(run.per_layer[2]["eff_rank"], 2), round(run.per_layer[2]["mlp"]["eff_rank"], 2)
        (7.09, 2.49)

    Attributes:
        model: what the run was told to measure.
        num_layers, hidden, n_calib_tokens: N, d, and the tokens of the text.
        per_layer: layer L's figures in `per_layer[L]` as the reference names them, its other views' under
            their names (`["masked"]`, `["mlp"]`, `["mlp"]["masked"]`), 95 % intervals under `["intervals"]`.
        top1_cos_adjacent: ⟨v_L, v_{L+1}⟩.
        phase_overlap: by phase, mean |cos| within it and with all other layers.
        block_capture: by layer, how much of v_L lies in what its phase shares.
        last_layer_normed, last_layer_residual: the last layer's row with the last state after and before
            the final norm.
        run: how it was made: versions, device, dtypes, flags, seconds by stage, closure, loss.
        directions: float32, (N, k, d): orthonormal rows, `[L, 0]` is v_L.
        singular_values: float32, (N, r): all of each layer, descending.
        top1_cos: float32, (N, N): ⟨v_L, v_M⟩.
        overlap: by view (`raw`, `masked`) what relates the layers, with chance and intervals.
        verdict: by phase, what that says of the hypothesis.
        control: a control's figures, see `compare_control`.
        text: excerpts from the text, see `excerpt`.
        principal_cosines: float32, (N, N, k): of the angles between every two layers' directions.
        projection_distance, grassmann_distance: float32, (N, N): √Σ sin²θ and √Σ θ² of these angles.
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
    directions: Float32[np.ndarray, "N k d"]
    singular_values: Float32[np.ndarray, "N r"]
    top1_cos: Float32[np.ndarray, "N N"]
    schema_version: int = SCHEMA_VERSION
    overlap: dict[str, dict[str, Any]] | None = None
    verdict: list[dict[str, Any]] | None = None
    control: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    principal_cosines: Float32[np.ndarray, "N N k"] | None = None
    projection_distance: Float32[np.ndarray, "N N"] | None = None
    grassmann_distance: Float32[np.ndarray, "N N"] | None = None

    ARRAYS = (
        "directions",
        "singular_values",
        "top1_cos",
        "principal_cosines",
        "projection_distance",
        "grassmann_distance",
    )

    def __repr__(self) -> str:
        """One line: all that is in a run fills a book."""
        size = f"{self.num_layers} layers, hidden size {self.hidden}"
        return f"<{type(self).__name__} of {self.model!r}: {size}, {self.n_calib_tokens} tokens>"

    def save(self, path: str | Path, more: Mapping[Path, bytes] | None = None) -> list[Path]:
        """Writes `path` (.json) and, beside it, .safetensors with the arrays: both, or neither.

        >>> run.save("demo.json")
        [PosixPath('demo.json'), PosixPath('demo.safetensors')]

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
    def load(cls: type[AnyResult], path: str | Path) -> AnyResult:
        """Reads what `save` wrote.

        >>> jaxdelta.Analysis.load("demo.json").top1_cos.shape
        (28, 28)

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

    def to_frame(self, view: str = "raw") -> Any:
        """The layers' figures in one view as a pandas DataFrame: a row a layer, a column a figure.

        `gamma` is σ_1; a figure with an interval has its bounds in `…_low` and `…_high`, and the ledger's
        entries are `ledger_…`. What is a list is left to `per_layer` and `singular_values`.

        >>> run.to_frame().loc[2:3, ["phase", "token_norm_mean", "eff_rank"]].round(2)
          phase  token_norm_mean  eff_rank
        L
        2     A            37.11      7.09
        3     A            25.16      6.55
        >>> int((run.to_frame("mlp")["eff_rank"] < run.to_frame()["eff_rank"]).sum())
        9

        Args:
            view: `raw`, `masked`, `attention.masked.centred`, …; see docs/definitions.md.

        Raises:
            UsageError: no such view, or not in this run.
            JaxDeltaError: pandas is not installed.
        """
        with extra("frames", "to_frame"):
            import pandas
        if view not in ALL:
            raise UsageError(f"view: no view {view!r}; there are {', '.join(ALL)}")
        found = [(row, view_of(row, view)) for row in self.per_layer]
        rows = [
            {"L": row["L"], "phase": row["phase"]} | _columns(figures) for row, figures in found if figures
        ]
        if not rows:
            raise UsageError(f"view: {view} was not measured; ask for it by views={view}")
        return pandas.DataFrame(rows).set_index("L")

    def save_directions(
        self,
        path: str | Path,
        *,
        rank: int = 1,
        layers: Iterable[int] | None = None,
        scale: str = "unit",
    ) -> Path:
        """Writes directions as a control vector, which steering tools add to the residual stream.

        A `.gguf` file is for llama.cpp (`--control-vector`) and repeng (`ControlVector.import_gguf`), a
        `.safetensors` file has the same names: `direction.L`, float32, is added to what leaves layer L,
        counted from 0. It is the direction in which the layer's summed update of all tokens (the raw view)
        points, so adding it strengthens what the layer writes, and the same run gives the same signs.

        >>> run.save_directions("late.gguf", layers=range(20, 28))
        PosixPath('late.gguf')

        Args:
            path: the file's name; the ending chooses the format.
            rank: which of the `top_k` directions, from 1, which is v_L.
            layers: which layers; all but layer 0, to which llama.cpp adds nothing, by default.
            scale: the vectors' lengths: `unit` 1; `rms` γ_L/√n, the root mean square over tokens of what the
                layer writes along the direction; `norm` the mean ‖δ_i‖.

        Returns:
            `path`.

        Raises:
            UsageError: an argument that this run or the format has nothing for.
            JaxDeltaError: gguf is not installed (`pip install 'jaxdelta[steering]'`), or the file cannot be
                written.
        """
        path = Path(path)
        # With the last state after the final norm, the last layer's direction lies in no stream.
        steered = range(self.num_layers - (self.run.get("last_state") == "normed"))
        tensors = steering.vectors(
            self.directions,
            steering.lengths(scale, rank, self.per_layer, self.singular_values),
            rank=rank,
            layers=layers,
            steered=steered,
        )
        said = f"direction {rank} of each layer's update, scale {scale}, by jaxdelta"
        hint = self.run.get("model_type", "qwen3")  # the only family when a run did not say
        write_together({path: steering.steering_file(path, tensors, hint, self.model, said)})
        return path


def _columns(figures: Mapping[str, Any]) -> dict[str, Any]:
    """A view's figures as the cells of a table's row."""
    single = {
        key: value
        for key, value in figures.items()
        if key not in ("L", "phase") and not isinstance(value, dict | list)
    }
    ledger = {f"ledger_{key}": value for key, value in figures.get("ledger", {}).items()}
    bounds = {
        f"{key}_{end}": bound
        for key, interval in figures.get("intervals", {}).items()
        for end, bound in zip(("low", "high"), interval or (None, None), strict=True)
    }
    inside = {one.name: one.of(figures) for one in registered() if one.first_of}
    return single | inside | ledger | bounds
