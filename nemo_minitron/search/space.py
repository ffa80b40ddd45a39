"""All architectures of a search space that a budget allows. Pure arithmetic on small data."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from nemo_minitron.arch import ArchSpec
from nemo_minitron.errors import ArchError, ConfigError
from nemo_minitron.prune.target import PRUNABLE_SIZES, target_arch
from nemo_minitron.search.budget import Constraint

MAX_COMBINATIONS = 500_000
"""More are refused: enumerating takes about 10 s for so many."""
UNFIT = "larger than the source or heads that do not divide"
"""What combinations are ruled out by that are no candidate under any constraint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """The sizes each axis may have; the space is their product.

    FFN widths are given by `ffn_hidden_size`, or by `ffn_expansion` as multiples of the hidden size, rounded to a
    multiple of `ffn_divisor`.
    """

    num_layers: tuple[int, ...]
    hidden_size: tuple[int, ...]
    num_attention_heads: tuple[int, ...]
    num_query_groups: tuple[int, ...]
    ffn_hidden_size: tuple[int, ...] = ()
    ffn_expansion: tuple[float, ...] = ()
    ffn_divisor: int = 1

    @property
    def num_combinations(self) -> int:
        """Size of the product."""
        ffn = self.ffn_expansion or self.ffn_hidden_size
        return math.prod(map(len, (self.num_layers, self.hidden_size, self.num_attention_heads, self.num_query_groups,
                                   ffn)))

    def ffn_sizes(self, hidden_size: int) -> list[int]:
        """FFN widths that go with a hidden size."""
        if not self.ffn_expansion:
            return list(self.ffn_hidden_size)
        step = self.ffn_divisor
        return [max(step, step * round(hidden_size * factor / step)) for factor in self.ffn_expansion]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Enumeration:
    """What came of a space: its candidates, in its order and without duplicates, and what ruled out others.

    `ruled_out`: how many combinations each constraint alone rules out, by its name; they overlap. One that is measured
    is counted among those that all others allow.
    """

    num_combinations: int
    candidates: tuple[ArchSpec, ...]
    ruled_out: Mapping[str, int]

    def check(self) -> Enumeration:
        """Return self, or raise `ConfigError` where nothing is left, with what each constraint rules out."""
        if not self.candidates:
            parts = ", ".join(f"{name} rules out {count:,}" for name, count in self.ruled_out.items() if count)
            raise ConfigError("no architecture is left", expected=f"one of {self.num_combinations:,} to meet every "
                              "constraint", found=f"each alone: {parts}", key="search.constraints")
        return self


def axis_sizes(source: ArchSpec, axis: str, *, listed: Sequence[int], smallest: int | None,
               divisor: int) -> tuple[int, ...]:
    """The sizes of one axis: those listed, or every multiple of `divisor` from `smallest` up to the source's.

    Without either it is the source's alone. Raises `ConfigError` for a size that is no positive multiple of the
    divisor (the source's own is allowed), or a list beside `smallest`.
    """
    largest = getattr(source, axis)
    if listed and smallest is not None:
        raise ConfigError("an axis is asked for twice", expected="a list or its smallest size", found="both",
                          key=f"search.{axis} and search.smallest.{axis}")
    bad = [size for size in listed if size < 1 or (size % divisor and size != largest)]
    if bad:
        raise ConfigError("a size that its divisor does not allow", expected=f"multiples of {divisor}",
                          found=", ".join(map(str, bad)), key=f"search.{axis} or search.divisors.{axis}")
    if listed:
        return tuple(dict.fromkeys(listed))
    if smallest is None:
        return (largest,)
    if not 1 <= smallest <= largest:
        raise ConfigError("bad smallest size", expected=f"from 1 to {largest} (the source's)", found=str(smallest),
                          key=f"search.smallest.{axis}")
    return tuple(dict.fromkeys([largest, *range(largest // divisor * divisor, smallest - 1, -divisor)]))


def enumerate_candidates(source: ArchSpec, space: Space, constraints: Sequence[Constraint]) -> Enumeration:
    """Every architecture of the space that can be pruned from `source` and meets all constraints.

    Query heads are pruned alike in every group, so their number is a multiple of the groups with at most as many a
    group as the source has. Raises `ConfigError` for a space that is too large.
    """
    total = space.num_combinations
    if total > MAX_COMBINATIONS:
        raise ConfigError("the search space is too large", expected=f"at most {MAX_COMBINATIONS:,} combinations",
                          found=f"{total:,}", key="search.divisors or search.smallest")
    ruled_out = dict.fromkeys([UNFIT, *(constraint.name for constraint in constraints)], 0)
    candidates: dict[ArchSpec, None] = {}
    for layers, heads, groups, hidden in itertools.product(space.num_layers, space.num_attention_heads,
                                                           space.num_query_groups, space.hidden_size):
        for ffn in space.ffn_sizes(hidden):
            sizes = dict(zip(PRUNABLE_SIZES, (layers, hidden, ffn, heads, groups), strict=True))
            arch = _pruned(source, sizes)
            if arch is None:
                ruled_out[UNFIT] += 1
                continue
            broken = [constraint.name for constraint in constraints
                      if not constraint.measured and not constraint.allows(arch)]
            if not broken:
                broken = [constraint.name for constraint in constraints
                          if constraint.measured and not constraint.allows(arch)]
            for name in broken:
                ruled_out[name] += 1
            if not broken:
                candidates.setdefault(arch)
    return Enumeration(num_combinations=total, candidates=tuple(candidates), ruled_out=ruled_out)


def _pruned(source: ArchSpec, sizes: Mapping[str, int]) -> ArchSpec | None:
    try:
        return target_arch(source, sizes)
    except ArchError:
        return None
