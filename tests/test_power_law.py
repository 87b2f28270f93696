"""The exponent of a spectrum that falls as a power of the rank."""

import numpy as np
import pytest

from jaxdelta.statistics.per_layer.power_law import power_law_exponent


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 3.0])
def test_a_planted_exponent_is_found(exponent: float) -> None:
    values = 7.0 * np.arange(1, 101) ** (-exponent / 2)
    assert power_law_exponent(values) == pytest.approx(exponent, abs=1e-12)


def test_it_is_the_slope_of_the_line_that_numpy_fits() -> None:
    values = np.sort(np.random.default_rng(0).lognormal(size=(3, 4, 30)))[..., ::-1]
    values[1, :, 20:] = 1e-9 * values[1, :, :1]  # rounding, which is left out
    for sets in np.ndindex(3, 4):
        count = 20 if sets[0] == 1 else 30
        ranks, energies = np.log(np.arange(1, count + 1)), np.log(values[sets][:count] ** 2)
        wanted = -np.polyfit(ranks, energies, 1)[0]
        assert power_law_exponent(values)[sets] == pytest.approx(wanted, rel=1e-10)


def test_without_two_directions_it_is_zero() -> None:
    assert power_law_exponent(np.zeros(5)) == 0
    assert power_law_exponent(np.array([3.0, 0, 0])) == 0
    assert power_law_exponent(np.array([3.0])) == 0
