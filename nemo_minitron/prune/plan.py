"""Decide what to keep: importance scores and a target shape become a `Plan`. Pure; `surgery` carries it out.

One-shot, top-k per axis, as in arXiv:2407.14679, sections 2.2 and 2.3: each layer ranks its own FFN neurons,
hidden channels are ranked once for the whole network, layers by block influence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import Plan
from nemo_minitron.errors import ArchError, ConfigError, ScoresError
from nemo_minitron.importance.aggregate import importance
from nemo_minitron.importance.scores import DEFAULT_AGGREGATION, Scores

PRUNABLE_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size")
FIXED_SIZES = ("num_attention_heads", "num_query_groups")
"""Accepted in a target, but only with the source's value: attention is kept whole (arXiv:2408.11796, section 2)."""


def target_arch(source: ArchSpec, target: Mapping[str, int]) -> ArchSpec:
    """`source` with the sizes in `target`; sizes that `target` does not name stay.

    Raises:
        ConfigError: an unknown key.
        ArchError: a size that is not a positive int, is larger than the source's, or changes heads or groups.
    """
    for key, size in target.items():
        if key not in PRUNABLE_SIZES + FIXED_SIZES:
            raise ConfigError("unknown size", expected="one of " + ", ".join(PRUNABLE_SIZES + FIXED_SIZES),
                              found=repr(key), key=f"prune.target.{key}")
        source_size = getattr(source, key)
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= source_size:
            raise ArchError("the target does not fit its source", key=f"prune.target.{key}", found=repr(size),
                            expected=f"{key} to be an integer from 1 to {source_size} (the source's)")
        if key in FIXED_SIZES and size != source_size:
            raise ArchError("attention heads and query groups are not pruned", key=f"prune.target.{key}",
                            expected=f"{key} to be {source_size} (the source's)", found=repr(size))
    changes: dict[str, Any] = dict(target)
    return dataclasses.replace(source, **changes).check()


def make_plan(source: ArchSpec, target: Mapping[str, int], scores: Scores | None, *,
              batch: str = DEFAULT_AGGREGATION["batch"],
              sequence: str = DEFAULT_AGGREGATION["sequence"]) -> Plan:
    """Keep the most important units of each axis that `target` makes smaller.

    Indices are ascending source indices, so what is kept stays in its order. Equal importance keeps the lower
    index, which makes the plan a function of its arguments alone and the kept set of a smaller target a subset of
    that of a larger one. An axis that is not cut needs no scores and keeps all indices.

    Args:
        source: shape of the scored model.
        target: sizes by name: num_layers, hidden_size, ffn_hidden_size; those left out stay as they are.
            num_attention_heads and num_query_groups are accepted with the source's value only.
        scores: of this very model; may be None where no axis is cut.
        batch, sequence: see `importance.aggregate`.

    Raises:
        ConfigError, ArchError: as `target_arch`.
        ScoresError: the scores are of another architecture, or lack an axis that is cut.
    """
    arch = target_arch(source, target)
    if scores is not None and scores.source != source:
        differing = [field.name for field in dataclasses.fields(source)
                     if getattr(source, field.name) != getattr(scores.source, field.name)]
        raise ScoresError("the scores belong to another model", key="importance.scores or teacher.path",
                          expected=", ".join(f"{name} {getattr(source, name)}" for name in differing),
                          found=", ".join(f"{name} {getattr(scores.source, name)}" for name in differing))

    def keep(axis: str, source_size: int, size: int, rows: tuple[int, ...] = (0,)) -> tuple[tuple[int, ...], ...]:
        """Kept indices of `axis` for each of `rows` (one row for a network-wide axis, else the kept layers)."""
        if size == source_size:
            return (tuple(range(source_size)),) * len(rows)
        if scores is None:
            raise ScoresError("no scores", expected=f"importance of axis '{axis}', which the target cuts",
                              found="none", key="importance.scores")
        per_row = np.atleast_2d(importance(scores, axis, batch=batch, sequence=sequence))
        return tuple(top_indices(per_row[row], size) for row in rows)

    (layers,) = keep("layers", source.num_layers, arch.num_layers)
    (hidden,) = keep("hidden", source.hidden_size, arch.hidden_size)
    return Plan(
        source=source, target=arch, layers=layers, hidden=hidden,
        ffn=keep("ffn", source.ffn_hidden_size, arch.ffn_hidden_size, layers),
        heads=keep("heads", source.num_attention_heads, arch.num_attention_heads, layers),
        groups=keep("groups", source.num_query_groups, arch.num_query_groups, layers),
        scores_digest=None if scores is None else scores.digest(),
    )


def top_indices(importance_of_units: npt.NDArray[np.float64], num_kept: int) -> tuple[int, ...]:
    """Ascending indices of the `num_kept` largest of [units]; equal values keep the lower index."""
    order = np.argsort(-importance_of_units, kind="stable")
    return tuple(sorted(int(index) for index in order[:num_kept]))
