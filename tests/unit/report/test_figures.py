from __future__ import annotations

import math

import pytest

from nemo_minitron.report.charts import Series, line_chart
from nemo_minitron.report.figures import MAX_POINTS, bucket_means


def test_bucket_means_keep_the_mean_and_the_last_short_bucket() -> None:
    rows = [{"tokens": 10.0 * step, "kl": float(step % 7)} for step in range(1, 2 * MAX_POINTS + 2)]
    xs, ys, size = bucket_means(rows, "kl")
    assert size == 3
    assert len(xs) == len(ys) == math.ceil(len(rows) / 3) <= MAX_POINTS
    assert ys[0] == pytest.approx((1 + 2 + 3) / 3)
    assert xs[1] == pytest.approx((40 + 50 + 60) / 3)
    assert xs[-1] == pytest.approx(sum(row["tokens"] for row in rows[-1:]) / 1)


def test_bucket_means_skip_absent_and_nan() -> None:
    rows = [{"tokens": 1.0, "kl": math.nan}, {"tokens": 2.0}, {"tokens": 3.0, "kl": 0.5}]
    assert bucket_means(rows, "kl") == ([3.0], [0.5], 1)
    assert bucket_means([], "kl") == ([], [], 1)


def test_line_chart_leaves_out_what_it_cannot_draw() -> None:
    series = Series(xs=[0, 1, 2, 3], ys=[math.nan, 1.0, math.inf, 2.0], tone="ce", label="one", marker="circle")
    chart = line_chart([series], title="t", x_label="tokens", y_label="nats/token")
    assert chart.count("<circle") == 2 * 2  # two points, wide and narrow
    assert "nan" not in chart
    assert "inf" not in chart


def test_line_chart_of_one_point_and_of_none() -> None:
    one = Series(xs=[0.0], ys=[2.0], tone="ce")
    for log_y in (False, True):
        assert line_chart([one], title="t", x_label="x", y_label="y", log_y=log_y).count("<polyline") == 2
    assert "Nothing to plot" in line_chart([Series(xs=[], ys=[], tone="ce")], title="t", x_label="x", y_label="y")
