from __future__ import annotations

import math

import pytest

from nemo_minitron.report import formats

NB = "\u00a0"


@pytest.mark.parametrize(("value", "expected"), [
    (None, "\u2013"), (math.nan, "NaN"), (math.inf, "\u221e"), (0, "0"), (999, "999"), (999.6, f"1.00{NB}k"),
    (2_750_000, f"2.75{NB}M"), (9_996_000, f"10.0{NB}M"), (99_960_000, f"100{NB}M"), (999_999, f"1.00{NB}M"),
    (7.9e9, f"7.90{NB}B"), (15e12, f"15.0{NB}T"), (-1500, f"\u22121.50{NB}k"),
])
def test_count(value: float | None, expected: str) -> None:
    assert formats.count(value) == expected


@pytest.mark.parametrize(("value", "expected"), [(8e6, f"8{NB}M"), (2.5e6, f"2.5{NB}M"), (0, "0"), (100, "100")])
def test_short_count(value: float, expected: str) -> None:
    assert formats.short_count(value) == expected


@pytest.mark.parametrize(("value", "expected"), [
    (0.04, f"0.0{NB}s"), (59.94, f"59.9{NB}s"), (59.96, f"1{NB}min{NB}00{NB}s"), (192.4, f"3{NB}min{NB}12{NB}s"),
    (3599.7, f"1{NB}h{NB}00{NB}min"), (3840, f"1{NB}h{NB}04{NB}min"), (86_399, f"1{NB}d{NB}00{NB}h"),
])
def test_duration(value: float, expected: str) -> None:
    assert formats.duration(value) == expected


def test_loss_and_signs() -> None:
    assert formats.loss(1.8044) == "1.804"
    assert formats.signed(0.25) == "+0.250"
    assert formats.signed(-0.0304) == "\u22120.030"
    assert formats.signed(-0.0001) == "0.000"
    assert formats.signed(None) == "\u2013"
    assert formats.percent(0.9304) == "93.0%"


def test_perplexity_never_overflows() -> None:
    assert formats.perplexity(1.5) == f"{math.exp(1.5):.2f}"
    assert formats.perplexity(math.log(162_755)) == "162,755"
    assert formats.perplexity(2302.585) == "10^1000.0"
    assert formats.perplexity(math.nan) == "NaN"


def test_moment_survives_absurd_times() -> None:
    assert formats.moment(0) == "1970-01-01 00:00 UTC"
    assert formats.moment(1e30) == "\u2013"
