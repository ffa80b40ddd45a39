"""Samples of several sources, mixed by weight. Numpy only.

Which source the n-th training sample comes from is a function of n and the weights alone, so that the mixture is the
same at every data-parallel degree and micro-batch size and after a resume, as the order inside each source is
(`samples.sample_order`). After any number of samples, each source has had its share to within one (R. Tijdeman, "The
chairman assignment problem", 1980). Weights that stand in no proportion of whole numbers with a sum up to `CYCLE`
have their shares rounded to 1 / `CYCLE` first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.config import BlendSource
from nemo_minitron.errors import ConfigError

CYCLE = 10_000


class Mixture:
    """Shares of several sources, by weight."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Work out one cycle; only the proportions of `weights` count.

        Raises:
            ConfigError: a weight that is not positive, or so small that its share rounds to nothing.
        """
        if not weights or any(not 0 < weight < float("inf") for weight in weights):
            raise ConfigError("bad weights", expected="positive numbers", found=str(list(weights)), key="data.blend")
        self.weights = tuple(weights)
        self._counts = _turns(weights)
        if min(self._counts) == 0:
            raise ConfigError("a weight that is too small", expected=f"a share of at least 1/{CYCLE}",
                              found=str(list(weights)), key="data.blend")
        self._order, self._earlier = _cycle(self._counts)

    def source_of(self, position: int) -> tuple[int, int]:
        """The source of a training position, and how many earlier positions had the same."""
        cycle, index = divmod(position, len(self._order))
        source = int(self._order[index])
        return source, cycle * self._counts[source] + int(self._earlier[index])


def check_blend(blend: list[BlendSource], path: str | None, kind: str = "auto") -> None:
    """Raise `ConfigError` for a blend beside a path or of the corpus, names not distinct, or weights that are none."""
    if not blend:
        return
    if path is not None:
        raise ConfigError("a path and a blend", expected="data.path or data.blend", found="both", key="data.blend")
    if kind == "corpus":
        raise ConfigError("a blend of the embedded corpus", expected="auto, text, indexed or chat", found=kind,
                          key="data.kind or data.blend")
    names = [source.name for source in blend]
    if len(set(names)) < len(names):
        raise ConfigError("bad blend", expected="a name of its own for each source", found=", ".join(names),
                          key="data.blend")
    Mixture([source.weight for source in blend])


def apportion(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """`total` things shared out by weight: whole numbers, largest remainders first, of equal ones the first."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    counts = np.floor(shares).astype(np.int64)
    for source in np.argsort(counts - shares, kind="stable")[: total - int(counts.sum())]:
        counts[source] += 1
    return tuple(int(count) for count in counts)


def _turns(weights: Sequence[float]) -> tuple[int, ...]:
    """Turns of each source in one cycle: the weights' own proportion in least whole numbers, or shares of `CYCLE`."""
    exact = [Fraction(str(weight)) for weight in weights]  # of what was written: 0.1 is 1/10
    scale = Fraction(math.lcm(*(weight.denominator for weight in exact)), math.gcd(*(w.numerator for w in exact)))
    turns = tuple(int(weight * scale) for weight in exact)
    return turns if sum(turns) <= CYCLE else apportion(weights, CYCLE)


def _cycle(counts: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One cycle of sources, and how often each had its turn before; counts sum to the length.

    Tijdeman's rule: of the sources whose turn may come (so far behind that one more puts none ahead by too much), the
    one whose next turn is due first.
    """
    shares = np.asarray(counts, dtype=np.float64) / sum(counts)
    slack = 1.0 / max(2 * len(counts) - 2, 1)
    had = np.zeros(len(counts), dtype=np.int64)
    order = np.empty(sum(counts), dtype=np.int64)
    earlier = np.empty_like(order)
    for index in range(len(order)):
        may = shares * (index + 1) - had >= slack - 1e-9
        due = np.where(may, (had + 1 - slack) / shares, np.inf)
        source = int(due.argmin())
        order[index], earlier[index] = source, had[source]
        had[source] += 1
    return order, earlier
