"""Massive activations by channel: planted channels are found, shares are those of plain NumPy."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from test_page import checked
from updates import WIDE, K, from_moments, from_rows, tokens, update

from jaxdelta.report import tables
from jaxdelta.report.analysis import Analysis
from jaxdelta.report.charts.layers import ranks
from jaxdelta.spectra.channels import ChannelTable
from jaxdelta.spectra.views import MASKED, RAW
from jaxdelta.statistics.layer_row import layer_row
from jaxdelta.statistics.per_layer.massive_channels import LARGEST
from jaxdelta.statistics.per_layer.registry import registered
from jaxdelta.text.groups import ResamplingGroups

SAMPLE = ResamplingGroups.of(tokens(WIDE[0]), 20, 0)
WRITTEN, REMOVED, UNTOUCHED = 5, 70, 33


def planted() -> tuple[np.ndarray, np.ndarray]:
    """δ and h: one channel is written, one removed, one is large in the state alone."""
    rng = np.random.default_rng(0)
    delta, h = rng.normal(size=(2, *WIDE))
    delta[:, WRITTEN] += 40
    h[:, REMOVED] -= 30
    delta[:, REMOVED] = -h[:, REMOVED]
    h[:, UNTOUCHED] = 90
    delta[:, UNTOUCHED] = 0
    return delta, h


def table_of(delta: np.ndarray, h: np.ndarray) -> ChannelTable:
    return ChannelTable(*(np.square(x).sum(axis=0) for x in (delta, h, h + delta)))


def row_of(table: ChannelTable | None) -> dict[str, Any]:
    layer = from_rows(update(WIDE), SAMPLE, views=(RAW,))
    views = {view: summary._replace(channels=table) for view, summary in layer.views.items()}
    return layer_row(0, "A", layer._replace(views=views), SAMPLE, K, WIDE[1])


@pytest.mark.parametrize("maker", [from_rows, from_moments])
def test_both_makers_sum_by_channel(maker: Any) -> None:
    """Of the tokens that a view has: without the sink in the masked one."""
    wrote = update(WIDE, sinks={7: 40.0})
    layer = maker(wrote, SAMPLE, views=(RAW, MASKED))
    for view, kept in ((RAW, np.ones(WIDE[0], bool)), (MASKED, np.arange(WIDE[0]) != 7)):
        delta, h = (x.astype(np.float64)[kept] for x in (wrote.delta, wrote.h))
        for found, wanted in zip(layer.views[view].channels, table_of(delta, h), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_planted_channels_are_found() -> None:
    delta, h = planted()
    row = row_of(table_of(delta, h))
    json.dumps(row, allow_nan=False)
    first, second, _ = row["massive_channels"]["update"]
    assert first == {"channel": WRITTEN, "share": first["share"], "effect": "writes"}
    assert second == {"channel": REMOVED, "share": second["share"], "effect": "removes"}
    largest, *_ = row["massive_channels"]["state"]
    assert largest == {"channel": UNTOUCHED, "share": largest["share"], "effect": "keeps"}
    for name, key, x in (
        ("update", "channel_top3_frac", delta),
        ("state", "state_channel_top3_frac", h + delta),
    ):
        shares = np.linalg.norm(x, axis=0) ** 2 / np.linalg.norm(x) ** 2
        order = sorted(range(WIDE[1]), key=lambda j: -shares[j])[:LARGEST]
        found = row["massive_channels"][name]
        assert [one["channel"] for one in found] == order
        np.testing.assert_allclose([one["share"] for one in found], shares[order], rtol=1e-12)
        assert row[key] == pytest.approx(shares[order].sum(), rel=1e-12)


def test_an_update_of_nothing_holds_nothing() -> None:
    row = row_of(table_of(np.zeros(WIDE), np.zeros(WIDE)))
    assert row["massive_channels"] == {"update": [], "state": []}
    assert row["channel_top3_frac"] == row["state_channel_top3_frac"] == 0


def test_without_sums_by_channel_they_are_left_out() -> None:
    assert not row_of(None).keys() & {one.name for one in registered("channels")}


def test_terminal_page_and_charts_show_them(analysed: Analysis) -> None:
    without = {one.name for one in registered("channels")}
    rows = [{key: value for key, value in row.items() if key not in without} for row in analysed.per_layer]
    bare = dataclasses.replace(analysed, per_layer=rows)
    assert "Massive channels" not in tables.tables(bare) + checked(bare).text
    table = table_of(*planted())
    more = {one.name: one.function(table) for one in registered("channels")}
    run = dataclasses.replace(analysed, per_layer=[row | more for row in analysed.per_layer])
    written, removed, _ = more["massive_channels"]["update"]
    assert f" L= 0 +5 {written['share']:.3f}, -70 {removed['share']:.3f}, " in tables.tables(run)
    assert f"5: {written['share']:.3f} (writes), 70: {removed['share']:.3f} (removes)" in checked(run).text
    (panel,) = (one for one in ranks(run).panels if one.title == "Energy in the largest 3 channels")
    assert [series.y[0] for series in panel.series] == [
        more["channel_top3_frac"],
        more["state_channel_top3_frac"],
    ]
