"""What is kept of a layer: its row, and no array that grows with the text; and its bytes in a checkpoint."""

from typing import Any

import numpy as np
import pytest
from updates import K, from_rows, tokens, update

from jaxdelta.run.record_files import pack, unpack
from jaxdelta.spectra.view_summary import FACTOR_ROWS, LayerSummary
from jaxdelta.spectra.views import MASKED, RAW
from jaxdelta.statistics.across_layers.phases import Phases
from jaxdelta.statistics.layer_row import LayerRecord, layer_record, layer_row
from jaxdelta.sweep.sweep import Update
from jaxdelta.text.groups import ResamplingGroups

N, D = FACTOR_ROWS + 9, 40
SAMPLE, PHASES = ResamplingGroups.of(tokens(N), 20, 0), Phases(("A", "B"))


def record(number: int, layer: LayerSummary) -> LayerRecord:
    return layer_record(number, layer, PHASES, SAMPLE, K, D)


def overflowed() -> Update:
    wrote = update((N, D))
    wrote.mlp[3] = np.inf
    return wrote


@pytest.fixture(scope="module")
def layers() -> list[LayerSummary]:
    """Two layers, and the last with the final norm; the second has a sink."""
    wrote = update((N, D), 0), update((N, D), 1, {5: 60.0}), update((N, D), 2)
    return [from_rows(one, SAMPLE) for one in wrote]


def arrays(views: Any) -> list[np.ndarray]:
    return [part for view in views.values() for part in view if isinstance(part, np.ndarray)]


def test_rows_stay_and_tokens_go(layers: list[LayerSummary]) -> None:
    places = [(0, "A"), (1, "B"), (1, "B")]  # the normed one is in the last one's place
    for number, (layer, place) in enumerate(zip(layers, places, strict=True)):
        assert any(N in array.shape for array in arrays(layer.views))
        found = record(number, layer)
        assert found.row == layer_row(*place, layer, SAMPLE, K, D)
        assert list(found.views) == [RAW, MASKED]
        assert (found.finite, found.on_host) == (True, False)
        assert found.certificate == max(view.certificate for view in layer.views.values())
        for view, lighter in found.views.items():
            for name in ("singular_values", "basis", "coupling", "factor"):
                assert getattr(lighter, name) is getattr(layer.views[view], name) is not None
        assert not [array.shape for array in arrays(found.views) if N in array.shape]
        assert (found.views[RAW] is found.views[MASKED]) == (number != 1)


def test_a_layer_that_overflowed_has_no_row() -> None:
    found = record(0, from_rows(overflowed(), SAMPLE))
    assert (found.row, found.finite) == ({}, False)


def test_a_record_comes_back_bit_for_bit(layers: list[LayerSummary]) -> None:
    for number, layer in enumerate([*layers, from_rows(overflowed(), SAMPLE)]):
        kept = record(number, layer)
        found = unpack(pack(kept))
        assert pack(found) == pack(kept)
        assert found._replace(views={}) == kept._replace(views={})
        assert list(found.views) == list(kept.views)
        assert (found.views[RAW] is found.views[MASKED]) == (kept.views[RAW] is kept.views[MASKED])
        for one, other in zip(found.views.values(), kept.views.values(), strict=True):
            for name, part, same in zip(one._fields, one, other, strict=True):
                assert (part is None) == (same is None), name
                if same is not None:
                    assert np.asarray(part).dtype == np.asarray(same).dtype, name
                    np.testing.assert_array_equal(part, same, err_msg=name, strict=True)


def test_a_record_from_another_hand_runs_no_code() -> None:
    """Arrays of objects are pickled: they are refused."""
    import io

    file = io.BytesIO()
    np.savez(file, header=np.asarray({"row": {}}, dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        unpack(file.getvalue())
