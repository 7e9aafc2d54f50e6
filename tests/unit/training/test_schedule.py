"""The learning rate, against numbers of the published training (detectron2's warm-up and cosine)."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxydet.training.config import ScheduleConfig
from proxydet.training.step import learning_rate_factor

R50 = {
    0: 2.0e-07,
    1: 3.99739083e-07,
    10: 2.19739083e-06,
    500: 1.00069541e-04,
    999: 1.99739344e-04,
    1000: 1.99939083e-04,
    1001: 1.99938961e-04,
    5000: 1.98480775e-04,
    45000: 1.0e-04,
    89999: 6.09234885e-14,
}


@pytest.mark.parametrize(("iteration", "expected"), R50.items())
def test_published_r50(iteration, expected):
    factor = learning_rate_factor(iteration, 90_000, ScheduleConfig())
    assert 2e-4 * factor == pytest.approx(expected, rel=1e-8)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "iterations", "base"), [("r50", 90_000, 2e-4), ("swinb", 180_000, 1e-4)]
)
def test_published_schedules_in_full(name, iterations, base):
    path = Path(__file__).parents[4] / "shared/parity/parity_functions.npz"
    if not path.exists():
        pytest.skip("the full parity fixtures are not here")
    fixture = np.load(path)
    steps, expected = fixture[f"schedule.{name}.iterations"], fixture[f"schedule.{name}.lr"]
    ours = [base * learning_rate_factor(int(i), iterations, ScheduleConfig()) for i in steps]
    np.testing.assert_allclose(ours, expected, rtol=1e-9)


@given(
    iterations=st.integers(1, 2000),
    warmup=st.integers(0, 3000),
    shape=st.sampled_from(["cosine", "constant"]),
)
def test_factor_rises_in_warmup_then_never(iterations, warmup, shape):
    config = ScheduleConfig(warmup_iterations=warmup, shape=shape)
    factors = [learning_rate_factor(i, iterations, config) for i in range(iterations)]
    assert all(0 < f <= 1 for f in factors) or warmup > iterations
    after = factors[warmup:]
    assert after == sorted(after, reverse=True)
    if 0 < warmup <= iterations // 2:
        assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
