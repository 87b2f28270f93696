"""Figures of many layers: the same side by side on threads, in batches, and by NumPy where a solver fails."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from updates import WIDE, K, tokens, update

from jaxdelta.spectra import scheduler, view_summary
from jaxdelta.spectra.group_moments import FACTOR_ROWS, LEADING, Crossed
from jaxdelta.spectra.spectrum import MAX_RESIDUAL
from jaxdelta.spectra.view_summary import CROSSED, Design, LayerFigures
from jaxdelta.spectra.views import MASKED, RAW, View
from jaxdelta.statistics.layer_row import layer_row
from jaxdelta.sweep.sweep import BlockUpdate, Update
from jaxdelta.text.groups import Groups, Sample

SINKS = {5: 30.0, 40: 100.0}
OF = Sample.of(tokens(WIDE[0]), 20, seed=5)
VIEWS = (RAW, MASKED, View(centred=True), View("attention", masked=True))
DESIGN = Design(K, views=VIEWS, groups=OF.groups)
# Only the third layer has sinks.
UPDATES = [update(WIDE, seed, SINKS if seed == 2 else None) for seed in range(5)]


def measured(at_once: int, updates: Sequence[Update] = UPDATES) -> list[LayerFigures]:
    layers = ([BlockUpdate(jax.tree.map(jnp.asarray, wrote))] for wrote in updates)
    return scheduler.measure(layers, WIDE, DESIGN, at_once)


@pytest.fixture(scope="module")
def on_threads() -> list[LayerFigures]:
    return measured(2)


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


def assert_same(found: list[LayerFigures], wanted: list[LayerFigures], tolerance: float = 1e-6) -> None:
    """The rows, the directions, and what relations between layers need."""
    for one, other in zip(found, wanted, strict=True):
        rows = (layer_row(0, "A", layer, OF, K, WIDE[1]) for layer in (one, other))
        assert_close(*rows, tolerance)
        for view, figure in one.views.items():
            same = other.views[view]
            np.testing.assert_array_equal(figure.kept, same.kept)
            np.testing.assert_allclose(figure.directions, same.directions, rtol=0, atol=tolerance)
            assert (figure.crossed is None) == (same.crossed is None) == (view not in CROSSED)
            if figure.crossed is not None and same.crossed is not None:
                np.testing.assert_allclose(figure.crossed.factor, same.crossed.factor, atol=1e-5)
                np.testing.assert_allclose(
                    figure.crossed.coupling, same.crossed.coupling, rtol=1e-4, atol=1e-3
                )


def test_layers_come_in_their_order(on_threads: list[LayerFigures]) -> None:
    for wrote, layer in zip(UPDATES, on_threads, strict=True):
        delta = (wrote.attention + wrote.mlp).astype(np.float64)
        assert layer.ledger["update"] == pytest.approx(np.sum(delta**2), rel=1e-9)
        values = np.linalg.svd(delta, compute_uv=False)
        np.testing.assert_allclose(layer.views[RAW].singular_values, values, rtol=1e-9)
    assert [layer.views[MASKED] is layer.views[RAW] for layer in on_threads] == [
        True,
        True,
        False,
        True,
        True,
    ]
    assert all(0 <= figure.residual < MAX_RESIDUAL for layer in on_threads for figure in layer.views.values())


def test_batches_give_the_same(on_threads: list[LayerFigures], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert_same(measured(5), on_threads)


def test_few_axes_of_a_long_update_serve_as_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: as many as a factor has are found of the compared views, of the others some."""
    shape, views = (FACTOR_ROWS + 28, FACTOR_ROWS + 8), (RAW, View(centred=True))
    design = Design(K, views=views, groups=Sample.of(tokens(shape[0]), 20, seed=5).groups)
    assert [design.axes(view, *shape) for view in views] == [FACTOR_ROWS, LEADING]

    def figures_of() -> LayerFigures:
        return scheduler.measure([[BlockUpdate(jax.tree.map(jnp.asarray, update(shape)))]], shape, design)[0]

    few = figures_of().views
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    every = figures_of().views
    for view in views:
        one, other = few[view].found.resampled, every[view].found.resampled
        assert one is not None and other is not None
        np.testing.assert_allclose(one.without, other.without, rtol=1e-6)
        np.testing.assert_allclose(one.split_half, other.split_half, rtol=1e-4)
    squares = [of[RAW].crossed.factor.T @ of[RAW].crossed.factor for of in (few, every)]
    np.testing.assert_allclose(*squares, rtol=0, atol=1e-5 * squares[0].max())


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_spectra_that_fail_are_done_again_with_all_figures(
    backend: str, on_threads: list[LayerFigures], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(scheduler, "MAX_RESIDUAL", -1.0)
    again = measured(2, UPDATES[1:3])
    assert all(figure.on_host for layer in again for figure in layer.views.values())
    assert not any(figure.on_host for layer in on_threads for figure in layer.views.values())
    assert_same(again, on_threads[1:3])


# What relations between layers need


@pytest.fixture(params=["numpy", "jax"])
def crossed(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[tuple[int, int]], tuple[np.ndarray, np.ndarray, Crossed]]:
    """Of a view with centre and mask: δ as it is there, its singular values, and what was found."""
    view = View("mlp", centred=True)
    call = scheduler._one_by_one if request.param == "numpy" else scheduler._together
    for module in (scheduler, view_summary):
        monkeypatch.setattr(module, "CROSSED", (view,))

    def found(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, Crossed]:
        wrote, n = update(shape), shape[0]
        kept = np.arange(n) != 7
        membership = (np.arange(n) % 3 == np.arange(3)[:, None]).astype(np.float64)
        design = Design(2, groups=Groups(membership, np.zeros((0, 2, 3))))
        with jax.enable_x64(True):
            [figure] = scheduler._view([wrote], [kept], view, design, call)
        mlp = wrote.mlp.astype(np.float64)
        rows = kept[:, None] * (mlp - mlp[kept].mean(axis=0))
        assert figure.crossed is not None
        for group, coupling in zip(membership, figure.crossed.coupling, strict=True):
            wanted = figure.basis @ (rows[group > 0].T @ rows[group > 0])
            np.testing.assert_allclose(coupling, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
        return rows, np.linalg.svd(rows, compute_uv=False), figure.crossed

    return found


def test_the_factor_of_a_short_update_is_itself(crossed: Any) -> None:
    rows, _, found = crossed(WIDE)
    np.testing.assert_allclose(found.factor, rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(540, 520), (520, 48)], ids=["cut", "all of it"])
def test_the_factor_of_a_long_update_is_its_leading_directions(crossed: Any, shape: tuple[int, int]) -> None:
    rows, values, found = crossed(shape)
    assert found.factor.shape == (min(FACTOR_ROWS, *shape), shape[1])
    left = rows.T @ rows - found.factor.T.astype(np.float64) @ found.factor
    beyond = values[FACTOR_ROWS] ** 2 if len(values) > FACTOR_ROWS else 0.0
    assert np.linalg.norm(left, 2) == pytest.approx(beyond, abs=1e-6 * values[0] ** 2)
