"""The result of a run, and its files: JSON, safetensors and control vectors."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError
from safetensors.numpy import load, save

from jaxdelta.errors import JaxDeltaError, UsageError, extra, plain_errors, short
from jaxdelta.report import steering
from jaxdelta.spectra.views import ALL, view_of
from jaxdelta.statistics.per_layer.registry import registered
from jaxdelta.utils.files import GivenPath, given_path, json_path, write_together

SCHEMA_VERSION = 2
DIGEST = "arrays_sha256"  # in `run` of the JSON: SHA-256 of the .safetensors file
PAGE = ".html"
_PAGE_TITLE = "– jaxdelta</title>".encode()  # in the first bytes of every page

# A whole number of Python's or NumPy's, which `steering` checks.
if TYPE_CHECKING:
    Whole = int
else:
    Whole = object

# What reading values of the wrong kind raises.
_DAMAGED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    SafetensorError,
)

AnyResult = TypeVar("AnyResult", bound="Result")


def whole(path: object) -> AbstractContextManager[None]:
    """Reads or shows a saved run; a JaxDeltaError says that its file is missing or damaged."""
    messages: dict[Any, str] = {OSError: "{}: cannot be read ({})", _DAMAGED: "{}: is not an analysis ({})"}
    return plain_errors(path, messages, reason=lambda error: short(f"{type(error).__name__}: {error}", 200))


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Result:
    """The statistics of one run: the entries of its JSON file, and the arrays of its safetensors file.

    Two results are equal if all their numbers are, whatever `run` says of times, versions and device; of
    `run` only the loss is compared.

    Axes: N layers, hidden size d, k = `top_k` directions per layer. docs/definitions.md defines every key. A
    field that a file of an older version lacks is None.

    Examples:
        >>> run
        <Analysis of 'demo': 28 layers, hidden size 128, 100 tokens>
        >>> run.directions.shape  # (N, k, d)
        (28, 8, 128)
        >>> round(run.per_layer[2]["eff_rank"], 2), round(run.per_layer[2]["mlp"]["eff_rank"], 2)
        (7.09, 2.49)

    Attributes:
        model: the model as named in the run's options.
        num_layers, hidden, n_calib_tokens: N, d, and the number of tokens.
        per_layer: statistics of layer L in `per_layer[L]`, named as in the reference; other views nested
            under their names (`["masked"]`, `["mlp"]["masked"]`), 95 % intervals under `["intervals"]`.
        top1_cos_adjacent: ⟨v_L, v_{L+1}⟩.
        phase_overlap: by phase, mean |cos| within it and with all other layers.
        block_capture: by layer, the share of v_L in the subspace that its phase shares.
        last_layer_normed, last_layer_residual: the last layer's row with the last state after and before
            the final norm.
        run: provenance: versions, device, dtypes, flags, seconds by stage, closure, loss.
        directions: (N, k, d), orthonormal rows; `[L, 0]` is v_L.
        singular_values: (N, r), descending.
        top1_cos: (N, N), ⟨v_L, v_M⟩.
        overlap: comparison of layers by view (`raw`, `masked`), with chance and intervals.
        verdict: by phase, the verdict on the hypothesis.
        control: statistics of a control, see `compare_control`.
        text: excerpts from the text, see `excerpt`.
        principal_cosines: (N, N, k), cosines of the principal angles θ between two layers' directions.
        projection_distance, grassmann_distance: (N, N), √Σ sin²θ and √Σ θ².
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
        """Model, size and number of tokens, on one line."""
        size = f"{self.num_layers} layers, hidden size {self.hidden}"
        return f"<{type(self).__name__} of {self.model!r}: {size}, {self.n_calib_tokens} tokens>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Result):
            return NotImplemented
        loss = "calibration_loss"
        return self.run.get(loss) == other.run.get(loss) and all(
            _equal(getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(Result)
            if field.name != "run"
        )

    def __hash__(self) -> int:
        return hash((self.model, self.num_layers, self.hidden, self.n_calib_tokens))

    def save(self, path: GivenPath, more: Mapping[Path, bytes] | None = None) -> list[Path]:
        """Writes `path` (.json), the arrays (.safetensors) and `more` files: all of them or none.

        The JSON holds a digest of the arrays. A page that an earlier run left next to it is removed unless
        `more` has a new one.

        >>> run.save("demo.json")
        [PosixPath('demo.json'), PosixPath('demo.safetensors')]

        Returns:
            The paths of the files.

        Raises:
            UsageError: the name does not end in .json.
            JaxDeltaError: a file cannot be written.
        """
        path = json_path(path)
        names = [field.name for field in dataclasses.fields(self) if field.name not in self.ARRAYS]
        arrays_path, more, arrays = path.with_suffix(".safetensors"), more or {}, self.arrays_file()
        fields = {name: getattr(self, name) for name in names}
        fields["run"] = self.run | {DIGEST: hashlib.sha256(arrays).hexdigest()}
        text = json.dumps(fields, indent=1, allow_nan=False) + "\n"
        # The JSON is renamed last: if it exists, so do the others.
        write_together({**more, arrays_path: arrays, path: text.encode()})
        if (page := path.with_suffix(PAGE)) not in more and _is_page(page):
            page.unlink(missing_ok=True)
        return [path, arrays_path, *more]

    def arrays_file(self) -> bytes:
        """The content of the .safetensors file; equal runs give equal bytes."""
        fields = {name: getattr(self, name) for name in self.ARRAYS}
        arrays = {name: np.ascontiguousarray(array) for name, array in fields.items() if array is not None}
        return save(arrays, {"schema_version": str(self.schema_version)})

    @classmethod
    def load(cls: type[AnyResult], path: GivenPath) -> AnyResult:
        """Reads the files of `save`.

        >>> jaxdelta.Analysis.load("demo.json").top1_cos.shape
        (28, 28)

        Raises:
            JaxDeltaError: a file is missing or damaged, or comes from a newer version; or the arrays are
                another run's.
        """
        path = given_path(path)
        with whole(path):
            fields = json.loads(path.read_text(encoding="utf-8"))
            version = fields.get("schema_version", 0)
            if version > SCHEMA_VERSION:
                raise JaxDeltaError(
                    f"{path}: has schema_version {version}, this jaxdelta reads up to {SCHEMA_VERSION}"
                )
            stored = path.with_suffix(".safetensors").read_bytes()
            digest = fields["run"].pop(DIGEST, None)  # older files have none
            arrays: dict[str, Any] = load(stored)
            result = cls(**fields, **arrays)
            if digest not in (None, hashlib.sha256(stored).hexdigest()):
                raise JaxDeltaError(
                    f"{path}: the arrays in {path.stem}.safetensors are not this run's (their SHA-256 "
                    "differs); put the file that was written with this one next to it"
                )
            return result

    def to_frame(self, view: str = "raw") -> Any:
        """The statistics of one view as a pandas DataFrame: one row per layer, one column per statistic.

        `gamma` is σ_1; the bounds of intervals are `…_low` and `…_high`, the ledger's entries `ledger_…`.
        Lists are left to `per_layer` and `singular_values`.

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
            UsageError: a view that does not exist or was not measured.
            JaxDeltaError: pandas is not installed.
        """
        with extra("frames", "to_frame"):
            import pandas
        if view not in ALL:
            raise UsageError(f"view: no view {view!r}; there are {', '.join(ALL)}")
        rows = [
            {"L": row["L"], "phase": row["phase"]} | _columns(entry)
            for row in self.per_layer
            if (entry := view_of(row, view))
        ]
        if not rows:
            raise UsageError(f"view: {view} was not measured; ask for it by views={view}")
        return pandas.DataFrame(rows).set_index("L")

    def save_directions(
        self,
        path: GivenPath,
        *,
        rank: Whole = 1,
        layers: Whole | Iterable[Whole] | None = None,
        scale: str = "unit",
    ) -> Path:
        """Writes directions as a control vector, which steering tools add to the residual stream.

        A `.gguf` file is for llama.cpp (`--control-vector`) and repeng (`ControlVector.import_gguf`); a
        `.safetensors` file has the same names: `direction.L`, float32, is added to the output of layer L,
        counted from 0. Its sign is that of the layer's summed update of all tokens (raw view), so adding it
        strengthens what the layer writes.

        >>> run.save_directions("late.gguf", layers=range(20, 28))
        PosixPath('late.gguf')

        Args:
            path: a .gguf or .safetensors file.
            rank: number of the direction, 1 (v_L) to `top_k`.
            layers: the number of a layer, or several; by default all but layer 0, which llama.cpp refuses.
            scale: length of the vectors: `unit` 1; `rms` σ_rank/√n, the root mean square over tokens of the
                update along the direction; `norm` the mean ‖δ_i‖.

        Raises:
            UsageError: an argument that this run or the format cannot serve.
            JaxDeltaError: gguf is not installed, or the file cannot be written.
        """
        path = given_path(path)
        # After the final norm the last layer's direction is not in the residual stream.
        steered = range(self.num_layers - (self.run.get("last_state") == "normed"))
        rank = steering.check_rank(rank, self.directions.shape[1])
        lengths = steering.lengths(scale, rank, self.per_layer, self.singular_values)
        tensors = steering.vectors(self.directions, lengths, rank=rank, layers=layers, steered=steered)
        said = f"direction {rank} of each layer's update, scale {scale}, by jaxdelta"
        hint = self.run.get("model_type", "qwen3")  # older files have no model_type
        write_together({path: steering.steering_file(path, tensors, hint, self.model, said)})
        return path


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other, equal_nan=True)
    return type(one) is type(other) and bool(one == other)


def _is_page(path: Path) -> bool:
    """Whether a file is a page of this package."""
    try:
        with path.open("rb") as file:
            return _PAGE_TITLE in file.read(4096)
    except OSError:
        return False


def _columns(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a view in a layer's row of the data frame."""
    cells = {
        key: value
        for key, value in entry.items()
        if key not in ("L", "phase") and not isinstance(value, dict | list)
    }
    cells |= {statistic.name: statistic.of(entry) for statistic in registered() if statistic.first_of}
    cells |= {f"ledger_{key}": value for key, value in entry.get("ledger", {}).items()}
    for key, interval in entry.get("intervals", {}).items():
        cells[f"{key}_low"], cells[f"{key}_high"] = interval or (None, None)
    return cells
