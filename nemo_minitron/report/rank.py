"""How far two rankings agree. Pure: numpy only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def ranks(values: Array) -> Array:
    """Rank of each of [units] from 1; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    shared: Array = (last - (count - 1) / 2)[place]
    return shared


def spearman(first: Array, second: Array) -> float | None:
    """Spearman's rank correlation of two [units]; None where one is constant or there is one unit."""
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else None


def top_half_overlap(first: Array, second: Array) -> float:
    """Fraction of the most important half (at least one unit) of `first` that is in that of `second`."""
    count = max(1, len(first) // 2)
    tops = [set(np.argsort(-values, kind="stable")[:count].tolist()) for values in (first, second)]
    return len(tops[0] & tops[1]) / count
