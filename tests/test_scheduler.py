"""Summaries of layers: the same one by one and in batches, in order, by NumPy where a solver fails."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from updates import WIDE, K, from_rows, on_device, plan, tokens, update

from jaxdelta.spectra import scheduler
from jaxdelta.spectra.from_rows import LEADING_AXES, Wanted, summarise_update
from jaxdelta.spectra.group_moments import leave_one_out, split_half_cosines
from jaxdelta.spectra.scheduler import (
    Batched,
    BatchedSummaries,
    OneByOne,
    Schedule,
    Solver,
    Summaries,
    ThreadedSummaries,
    on_one_device,
    summarise_batch,
)
from jaxdelta.spectra.spectrum import MAX_RESIDUAL
from jaxdelta.spectra.token_table import state_products
from jaxdelta.spectra.view_summary import (
    COMPARED_VIEWS,
    FACTOR_ROWS,
    LayerSummary,
    MeasurementPlan,
    ViewSummary,
)
from jaxdelta.spectra.views import MASKED, RAW, View
from jaxdelta.statistics.layer_row import layer_row
from jaxdelta.sweep.sweep import BlockUpdate, Update
from jaxdelta.text.groups import Groups, ResamplingGroups

SINKS = {5: 30.0, 40: 100.0}
SAMPLE = ResamplingGroups.of(tokens(WIDE[0]), 20, seed=5)
PLAN = plan(views=(RAW, MASKED, View(centred=True), View("attention", masked=True)))
# Only the third layer has sinks.
UPDATES = [update(WIDE, seed, SINKS if seed == 2 else None) for seed in range(5)]
SOLVERS = {"one by one": OneByOne(SAMPLE.groups), "batched": on_one_device(2, SAMPLE.groups)}


def summarised(solver: Solver, updates: Sequence[Update] = UPDATES) -> list[LayerSummary]:
    with jax.enable_x64(True):
        return summarise_batch([on_device(wrote) for wrote in updates], PLAN, solver)


@pytest.fixture(scope="module")
def one_by_one() -> list[LayerSummary]:
    return summarised(OneByOne(SAMPLE.groups))


def assert_close(found: Any, wanted: Any, tolerance: float) -> None:
    """Of all entries of two rows."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted.keys() - {"closure"}:
            assert_close(found[name], wanted[name], tolerance)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other, tolerance)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=tolerance, abs=1e-9)
    else:
        assert found == wanted


def assert_same(found: list[LayerSummary], wanted: list[LayerSummary], tolerance: float = 1e-6) -> None:
    """The rows, the directions, and what the comparison of layers needs."""
    for one, other in zip(found, wanted, strict=True):
        rows = (layer_row(0, "A", layer, SAMPLE, K, WIDE[1]) for layer in (one, other))
        assert_close(*rows, tolerance)
        for view, summary in one.views.items():
            same = other.views[view]
            np.testing.assert_array_equal(summary.kept, same.kept)
            np.testing.assert_allclose(summary.basis, same.basis, rtol=0, atol=tolerance)
            compared = view in COMPARED_VIEWS
            assert (summary.factor is not None) == (same.factor is not None) == compared
            if compared:
                np.testing.assert_allclose(summary.factor, same.factor, atol=1e-5)
                np.testing.assert_allclose(summary.coupling, same.coupling, rtol=1e-4, atol=1e-3)


def test_summaries_are_those_of_their_layers(one_by_one: list[LayerSummary]) -> None:
    for wrote, layer in zip(UPDATES, one_by_one, strict=True):
        delta = (wrote.attention + wrote.mlp).astype(np.float64)
        assert layer.energies["update"] == pytest.approx(np.sum(delta**2), rel=1e-9)
        values = np.linalg.svd(delta, compute_uv=False)
        np.testing.assert_allclose(layer.views[RAW].singular_values, values, rtol=1e-9)
    without_sinks = [layer.views[MASKED] is layer.views[RAW] for layer in one_by_one]
    assert without_sinks == [True, True, False, True, True]
    assert all(0 <= view.certificate < MAX_RESIDUAL for layer in one_by_one for view in layer.views.values())


@pytest.mark.parametrize("at_once", [5, 2])
def test_batches_give_the_same(at_once: int, one_by_one: list[LayerSummary]) -> None:
    assert_same(summarised(on_one_device(at_once, SAMPLE.groups)), one_by_one)


@pytest.mark.parametrize("kind", ["threads", "batches", "batches in turn"])
def test_layers_come_in_their_order(kind: str, one_by_one: list[LayerSummary]) -> None:
    """The last one with the final norm as one more, numbered from the layer where the pass begins."""
    schedule = Schedule(at_once=2, pending=3, start=7)
    solver = Batched(2, scheduler._together, SAMPLE.groups, in_turn=kind == "batches in turn")

    def finish(number: int, layer: LayerSummary) -> tuple[int, LayerSummary]:
        return number, layer

    summaries: Summaries
    if kind == "threads":
        summaries = ThreadedSummaries(PLAN, finish, schedule, SAMPLE.groups)
    else:
        summaries = BatchedSummaries(PLAN, finish, schedule, solver)
    *layers, last, normed = map(on_device, UPDATES)
    with summaries:
        found = [one for wrote in layers for one in summaries.add([BlockUpdate(wrote)])]
        found += [*summaries.add([BlockUpdate(last, normed)]), *summaries.rest()]
    assert [number for number, _ in found] == list(range(7, 12))
    assert_same([layer for _, layer in found], one_by_one)


def test_few_axes_of_a_long_update_serve_as_all() -> None:
    """One by one: as many as a factor has are found of the compared views, of the others some."""
    shape, views = (FACTOR_ROWS + 28, FACTOR_ROWS + 8), (RAW, View(centred=True))
    sample = ResamplingGroups.of(tokens(shape[0]), 20, seed=5)
    wanted = [Wanted.of(plan(), view, *shape) for view in views]
    assert [one.axes(*shape, resampled=True) for one in wanted] == [FACTOR_ROWS, LEADING_AXES]
    wrote = on_device(update(shape))
    few, every = (
        from_rows(wrote, sample, solver, views=views).views
        for solver in (OneByOne(sample.groups), on_one_device(1, sample.groups))
    )
    for view in views:
        moments = [(of[view].group_moments, of[view].group_rest) for of in (few, every)]
        without = [leave_one_out(few[view].singular_values, *own) for own in moments]
        np.testing.assert_allclose(*without, rtol=1e-6)
        cosines = [split_half_cosines(own, sample.halves) for own, _ in moments]
        np.testing.assert_allclose(*cosines, rtol=1e-4)
    squares = [of[RAW].factor.T @ of[RAW].factor for of in (few, every)]
    np.testing.assert_allclose(*squares, rtol=0, atol=1e-5 * squares[0].max())


@pytest.mark.parametrize("kind", SOLVERS)
def test_spectra_that_fail_are_done_again_with_all_statistics(
    kind: str, one_by_one: list[LayerSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MAX_RESIDUAL", -1.0)
    again = summarised(SOLVERS[kind], UPDATES[1:3])
    assert all(view.on_host for layer in again for view in layer.views.values())
    assert not any(view.on_host for layer in one_by_one for view in layer.views.values())
    assert_same(again, one_by_one[1:3])


# Batches


class Counted:
    """Solves batches, and counts the layers of every call by what was computed."""

    def __init__(self) -> None:
        self.of_products: list[int] = []
        self.of_views: list[int] = []

    def __call__(self, function: Any, each: Sequence[Any], common: Any, static: Any) -> list[Any]:
        calls = {state_products: self.of_products, summarise_update: self.of_views}
        calls[function].append(len(each))
        return scheduler._together(function, each, common, static)


def test_one_sink_does_not_make_the_whole_batch_solve_its_masked_views() -> None:
    call = Counted()
    masked = (RAW, MASKED, View("mlp"), View("mlp", masked=True))
    with jax.enable_x64(True):
        batch = [on_device(wrote) for wrote in UPDATES[:4]]  # sinks in the third
        found = summarise_batch(batch, plan(views=masked), Batched(4, call, SAMPLE.groups))
    assert (call.of_products, call.of_views) == ([4], [4, 1, 4, 1])
    own = [layer.views[MASKED] is not layer.views[RAW] for layer in found]
    assert own == [False, False, True, False]
    assert found[2].views[MASKED].kept.sum() == WIDE[0] - len(SINKS)


@pytest.mark.parametrize(
    ("layers", "calls"), [(4, [4]), (3, [4]), (2, [1, 1]), (1, [1])], ids=["full", "most", "half", "one"]
)
def test_batches_have_one_size_or_are_single_layers(layers: int, calls: list[int]) -> None:
    """So that two programs serve all; the last batch is filled up where that is less work."""
    call = Counted()
    solver = Batched(4, call, SAMPLE.groups)
    with jax.enable_x64(True):
        batch = [on_device(wrote) for wrote in UPDATES[:layers]]
        found = summarise_batch(batch, plan(views=(RAW,)), solver)
    assert len(found) == layers and call.of_products == call.of_views == calls
    # What fills a batch up is given to no layer.
    firsts = [layer.views[RAW].singular_values[0] for layer in found]
    wanted = [np.linalg.svd(np.float64(wrote.delta), compute_uv=False)[0] for wrote in UPDATES[:layers]]
    np.testing.assert_allclose(firsts, wanted, rtol=1e-9)


def test_devices_solve_as_many_layers_as_they_are_at_once() -> None:
    call = Counted()
    with jax.enable_x64(True):
        batch = [on_device(wrote) for wrote in UPDATES[:3]]
        summarise_batch(batch, plan(views=(RAW, MASKED)), Batched(6, call, SAMPLE.groups, devices=2))
    assert (call.of_products, call.of_views) == ([2, 2], [2, 2, 2])


# What the comparison of layers needs


class ComparesEverything(MeasurementPlan):
    """Has layers compared by any of their views."""

    def compares(self, view: View) -> bool:
        return True


@pytest.mark.parametrize("kind", SOLVERS)
@pytest.mark.parametrize("shape", [WIDE, (540, 520), (520, 48)], ids=["short", "cut", "all of it"])
def test_the_coupling_and_the_factor_of_a_view(kind: str, shape: tuple[int, int]) -> None:
    """Of a centred, masked view. The factor of a short update is itself, of a long one its leading
    directions."""
    rows, found = compared(kind, shape)
    values = np.linalg.svd(rows, compute_uv=False)
    if shape[0] <= FACTOR_ROWS:
        np.testing.assert_allclose(found.factor, rows, rtol=0, atol=1e-5)
        return
    assert found.factor.shape == (min(FACTOR_ROWS, *shape), shape[1])
    left = rows.T @ rows - found.factor.T.astype(np.float64) @ found.factor
    beyond = values[FACTOR_ROWS] ** 2 if len(values) > FACTOR_ROWS else 0.0
    assert np.linalg.norm(left, 2) == pytest.approx(beyond, abs=1e-6 * values[0] ** 2)


def compared(kind: str, shape: tuple[int, int]) -> tuple[np.ndarray, ViewSummary]:
    """The rows of a view, and its summary, whose coupling is that of the rows."""
    wrote, n, view = update(shape), shape[0], View("mlp", centred=True)
    kept = np.arange(n) != 7
    membership = (np.arange(n) % 3 == np.arange(3)[:, None]).astype(np.float64)
    groups = Groups(membership)
    solver = {"one by one": OneByOne, "batched": partial(on_one_device, 1)}[kind](groups)
    with jax.enable_x64(True):
        every = ComparesEverything(2, resampled=True)
        (found,) = solver.summaries([(on_device(wrote), kept.astype(np.float64))], view, every)
    mlp = wrote.mlp.astype(np.float64)
    rows = kept[:, None] * (mlp - mlp[kept].mean(axis=0))
    for group, coupling in zip(membership, found.coupling, strict=True):
        wanted = found.basis @ (rows[group > 0].T @ rows[group > 0])
        np.testing.assert_allclose(coupling, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    return rows, found
