"""Decide what to keep: importance scores and a target shape become a `Plan`. Pure; `surgery` carries it out.

One-shot, top-k per axis, as in arXiv:2407.14679, sections 2.2 and 2.3: each layer ranks its own FFN neurons and
heads, hidden channels are ranked once for the whole network; layers go one by one or as a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import Plan
from nemo_minitron.errors import ConfigError, ScoresError
from nemo_minitron.importance.aggregate import Ranking, importance
from nemo_minitron.importance.scores import REMOVAL_ORDER, Scores
from nemo_minitron.prune.target import check_dropped, target_arch

LAYER_METRICS = ("block_influence", "loss", "accuracy", "logit_mse", "removal_order")

Rows = tuple[tuple[int, ...], ...]
Pairs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """Which layers go.

    - by: block_influence (arXiv:2407.14679, section 2.2); loss, accuracy (arXiv:2408.11796) or logit_mse
      (arXiv:2511.16664) of the model without the layer; removal_order, the greedy order by logit_mse.
    - contiguous: drop one block of neighbours. With loss, accuracy and logit_mse the block is measured as a whole;
      block influence is added up over it.
    - drop: just these layers, from 0; no scores are looked at.
    """

    by: str = "block_influence"
    contiguous: bool = False
    drop: tuple[int, ...] | None = None


def make_plan(source: ArchSpec, sizes: Mapping[str, int], scores: Scores | None, *, ranking: Ranking | None = None,
              layers: LayerChoice | None = None, head_residual: float = 0.0) -> Plan:
    """Keep the most important units of each axis that `sizes` makes smaller.

    Indices are ascending source indices, so what is kept stays in its order. Equal importance keeps the lower
    index, and of equal blocks of layers the first goes: the plan is a function of its arguments alone, and what a
    smaller target keeps of an axis is a subset of what a larger one keeps (but for contiguous blocks).
    An axis that is not cut needs no scores and keeps all indices.

    Args:
        source: shape of the scored model.
        sizes: sizes by name, see `target_arch`; those left out stay as they are.
        scores: of this very model; may be None where no axis is cut by importance.
        ranking: how scores become importance.
        layers: how layers are chosen.
        head_residual: coefficient c with which a pruned head's difference is added back, see `_head_pairs`.

    Raises:
        ConfigError, ArchError: as `target_arch`; a bad list of layers; heads that cannot be paired.
        ScoresError: the scores are of another architecture, or lack an axis that is cut.
    """
    how, choice = (ranking or Ranking()).check(), layers or LayerChoice()
    if choice.drop is not None:
        check_dropped(source, choice.drop)
        sizes = {**sizes, "num_layers": sizes.get("num_layers", source.num_layers - len(choice.drop))}
    arch = target_arch(source, sizes)
    if scores is not None:
        _check_source(scores, source)
    kept_layers = _layers(source, arch.num_layers, scores, how, choice)

    def per_row(axis: str) -> npt.NDArray[np.float64]:
        return np.atleast_2d(importance(_needed(scores, axis), axis, how))

    def keep(axis: str, size: int, kept: int, rows: tuple[int, ...]) -> Rows:
        if size == kept:
            return (tuple(range(size)),) * len(rows)
        values = per_row(axis)
        return tuple(top_indices(values[row], kept) for row in rows)

    (hidden,) = keep("hidden", source.hidden_size, arch.hidden_size, (0,))
    groups = keep("groups", source.num_query_groups, arch.num_query_groups, kept_layers)
    heads, pairs = _heads(source, arch, groups, kept_layers, per_row, head_residual)
    return Plan(
        source=source, target=arch, layers=kept_layers, hidden=hidden,
        ffn=keep("ffn", source.ffn_hidden_size, arch.ffn_hidden_size, kept_layers), heads=heads, groups=groups,
        head_pairs=pairs, head_residual=head_residual, scores_digest=None if scores is None else scores.digest(),
    )


def top_indices(importance_of_units: npt.NDArray[np.float64], num_kept: int) -> tuple[int, ...]:
    """Ascending indices of the `num_kept` largest of [units]; equal values keep the lower index."""
    return tuple(sorted(_ranked(importance_of_units)[:num_kept]))


def _ranked(importance_of_units: npt.NDArray[np.float64]) -> list[int]:
    """Indices from the most to the least important; of equal ones the lower index first."""
    return [int(index) for index in np.argsort(-importance_of_units, kind="stable")]


def _check_source(scores: Scores, source: ArchSpec) -> None:
    differing = [field.name for field in dataclasses.fields(source)
                 if getattr(source, field.name) != getattr(scores.source, field.name)]
    if differing:
        raise ScoresError("the scores belong to another model", key="prune.scores or teacher.path",
                          expected=", ".join(f"{name} {getattr(source, name)}" for name in differing),
                          found=", ".join(f"{name} {getattr(scores.source, name)}" for name in differing))


def _needed(scores: Scores | None, axis: str) -> Scores:
    if scores is None:
        raise ScoresError("no scores", expected=f"importance of axis '{axis}', which the target cuts", found="none",
                          key="prune.scores")
    return scores


def _layers(source: ArchSpec, num_kept: int, scores: Scores | None, how: Ranking,
            choice: LayerChoice) -> tuple[int, ...]:
    """Ascending source layers that stay."""
    whole, num_dropped = range(source.num_layers), source.num_layers - num_kept
    if choice.drop is not None:
        if len(choice.drop) != num_dropped:
            raise ConfigError("the list of layers does not fit the target", expected=f"{num_dropped} layers",
                              found=f"{len(choice.drop)}", key="prune.layers.drop")
        return tuple(layer for layer in whole if layer not in choice.drop)
    if not num_dropped:
        return tuple(whole)
    if choice.by not in LAYER_METRICS:
        raise ConfigError("unknown metric", expected="one of " + ", ".join(LAYER_METRICS), found=repr(choice.by),
                          key="prune.layers.by")
    scores = _needed(scores, "layers")
    if not choice.contiguous:
        return top_indices(_layer_importance(scores, how, choice.by, 1), num_kept)
    of_blocks = _layer_importance(scores, how, choice.by, num_dropped)
    start = int(np.argmin(of_blocks))
    return tuple(layer for layer in whole if not start <= layer < start + num_dropped)


def _layer_importance(scores: Scores, how: Ranking, by: str, length: int) -> npt.NDArray[np.float64]:
    """Importance [L - length + 1] of the block of `length` layers from each layer on."""
    if how.method != "activations" or by == "block_influence":
        single = importance(scores, "layers", how)
        return np.convolve(single, np.ones(length), mode="valid") if length > 1 else single
    if by == "removal_order" and length > 1:
        raise ConfigError("a removal order has no blocks", expected="another metric, or contiguous=false",
                          found="contiguous=true", key="prune.layers.contiguous")
    name = REMOVAL_ORDER if by == "removal_order" else f"layers.{by}.{length}"
    if name not in scores.tensors:
        raise ScoresError("layers are dropped by a metric that was not collected", expected=name,
                          found="only " + ", ".join(key for key in sorted(scores.tensors) if key.startswith("layers")),
                          key="importance.depth")
    return -scores.tensors[name] if by == "accuracy" else scores.tensors[name]


def _heads(source: ArchSpec, target: ArchSpec, groups: Rows, kept_layers: tuple[int, ...],
           per_row: Callable[[str], npt.NDArray[np.float64]], head_residual: float) -> tuple[Rows, tuple[Pairs, ...]]:
    """Kept heads of each kept layer, as many in every kept group, and the pairs of `_head_pairs`."""
    before, after = source.heads_per_group, target.heads_per_group
    if head_residual:
        _check_pairs(before, after)
    if before == after:
        every = tuple(tuple(head for group in row for head in range(group * before, (group + 1) * before))
                      for row in groups)
        return every, ()
    values = per_row("heads")
    heads: list[tuple[int, ...]] = []
    pairs: list[Pairs] = []
    for layer, row in zip(kept_layers, groups, strict=True):
        ranked = [[group * before + head for head in _ranked(values[layer, group * before : (group + 1) * before])]
                  for group in row]
        heads.append(tuple(head for group in ranked for head in sorted(group[:after])))
        pairs.append(tuple(pair for group in ranked for pair in _head_pairs(group, after)))
    return tuple(heads), tuple(pairs) if head_residual else ()


def _check_pairs(before: int, after: int) -> None:
    if before == after:
        raise ConfigError("no head is cut inside its KV group, so there is none to add back", expected="0",
                          found="another value", key="prune.head_residual")
    if before > 2 * after:
        raise ConfigError("heads cannot be paired", key="prune.head_residual", found=f"{before} -> {after}",
                          expected="at least half of each KV group's heads to stay")


def _head_pairs(ranked: list[int], num_kept: int) -> list[tuple[int, int]]:
    """(kept head, pruned head) inside one group, from its heads by falling importance.

    arXiv:2407.14679, section 2.3 with the index range corrected: with L heads of which K stay, counted from 1,
    head i in [2K - L + 1, K] is paired with head 2K - i + 1: the least important kept with the most important
    pruned. Surgery makes it head_i + c (head_i - partner): c = 1 is the printed formula, c < 0 moves towards the
    pruned head.
    """
    total = len(ranked)
    return [(ranked[i - 1], ranked[2 * num_kept - i]) for i in range(2 * num_kept - total + 1, num_kept + 1)]
