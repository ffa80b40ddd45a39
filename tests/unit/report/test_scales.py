from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.report.scales import Scale, linear_ticks, padded, spread


@pytest.mark.parametrize(("low", "high", "wanted", "expected"), [
    (0, 8e6, 4, [0, 2e6, 4e6, 6e6, 8e6]), (1.48, 2.02, 5, [1.6, 1.8, 2.0]), (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
])
def test_linear_ticks(low: float, high: float, wanted: int, expected: list[float]) -> None:
    assert linear_ticks(low, high, wanted) == pytest.approx(expected)


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(3, 10))
def test_linear_ticks_are_inside_and_not_too_many(low: float, room: float, wanted: int) -> None:
    high = low + max(room, abs(low) * 1e-6)
    ticks = linear_ticks(low, high, wanted)
    slack = (high - low) * 1e-6
    assert 1 <= len(ticks) <= wanted + 1
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert ticks == sorted(set(ticks))


def test_scale_maps_ends_and_middle() -> None:
    linear = Scale(low=1, high=3, start=200, end=100)
    assert [linear(1), linear(2), linear(3)] == [200, 150, 100]
    log = Scale(low=0.01, high=100, start=0, end=400, log=True)
    assert [log(0.01), log(1), log(100)] == pytest.approx([0, 200, 400])
    assert log.ticks(5) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert math.isfinite(log(0))


def test_log_scale_over_less_than_a_decade_still_has_ticks() -> None:
    assert len(Scale(low=1.1, high=1.9, start=0, end=1, log=True).ticks(5)) >= 2


def test_padded_is_never_empty() -> None:
    for low, high in ((0.0, 0.0), (3.0, 3.0), (-1.0, 2.0)):
        bottom, top = padded(low, high)
        assert bottom < low <= high < top


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-50, 350), min_size=1, max_size=8))
def test_spread_keeps_order_gap_and_range(wanted: list[float]) -> None:
    placed = spread(wanted, gap=15, low=0, high=300)
    assert all(0 <= y <= 300 for y in placed)
    ordered = sorted(placed)
    assert all(after - before >= 15 - 1e-9 for before, after in itertools.pairwise(ordered))
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    assert [placed[index] for index in order] == ordered
