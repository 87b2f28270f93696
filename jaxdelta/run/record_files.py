"""A layer's record as bytes and back, bit for bit: NumPy's .npz with a JSON header.

No pickle, so that opening a file runs no code from it.
"""

import io
import json
from typing import Any

import numpy as np

from jaxdelta.spectra.view_summary import ViewSummary
from jaxdelta.spectra.views import ALL
from jaxdelta.statistics.layer_row import LayerRecord

_HEADER = "header"


def pack(record: LayerRecord) -> bytes:
    """The record as bytes."""
    # Two views may share one summary: without sinks the masked view is the raw one.
    summaries = list({id(summary): summary for summary in record.views.values()}.values())
    numbers = {id(summary): number for number, summary in enumerate(summaries)}
    header = record._asdict() | {
        "views": {view.name: numbers[id(summary)] for view, summary in record.views.items()},
        "scalars": [
            {name: value for name, value in summary._asdict().items() if isinstance(value, int)}
            for summary in summaries
        ],
    }
    arrays = {
        f"{number}.{name}": value
        for number, summary in enumerate(summaries)
        for name, value in summary._asdict().items()
        if isinstance(value, np.ndarray)
    }
    file = io.BytesIO()
    np.savez(file, **{_HEADER: np.asarray(json.dumps(header))}, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def unpack(data: bytes) -> LayerRecord:
    """The record from its bytes."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        header = json.loads(str(arrays[_HEADER]))
        fields: list[dict[str, Any]] = header.pop("scalars")
        for key in arrays.files:
            if key != _HEADER:
                number, _, name = key.partition(".")
                fields[int(number)][name] = arrays[key]
    summaries = [ViewSummary(**values) for values in fields]
    header["views"] = {ALL[name]: summaries[number] for name, number in header["views"].items()}
    return LayerRecord(**header)
