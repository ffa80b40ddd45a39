"""What the nodes `prune` and `importance` ask for: the target's shape, the ranking, the layers that go. No torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nemo_minitron.arch import ArchSpec
from nemo_minitron.config import DepthConfig, ImportanceConfig, PruneConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.evaluate.questions import read_questions
from nemo_minitron.importance.aggregate import Ranking
from nemo_minitron.prune.plan import LayerChoice
from nemo_minitron.prune.target import PRUNABLE_SIZES, resolve_target


def layer_choice(prune: PruneConfig) -> LayerChoice:
    """Which layers go."""
    drop = prune.layers.drop
    return LayerChoice(by=prune.layers.by, contiguous=prune.layers.contiguous,
                       drop=None if drop is None else tuple(drop))


def how_to_rank(importance: ImportanceConfig) -> Ranking:
    """The recipe's choices, none of which needs another pass."""
    method = "iterative" if importance.iterations > 1 else importance.method
    return Ranking(method=method, batch=importance.batch, sequence=importance.sequence,
                   norms=tuple(importance.norms), ranking=importance.ranking).check()


def sizes_of(arch: ArchSpec) -> dict[str, int]:
    """All prunable sizes of an architecture, by name."""
    return {name: getattr(arch, name) for name in PRUNABLE_SIZES}


def resolved_target(source: ArchSpec, prune: PruneConfig) -> ArchSpec:
    """The architecture after pruning, or a `UserError` before anything has run."""
    sizes, ratios = _given(prune.target), _given(prune.ratio)
    total, non_embedding = prune.budget.num_parameters, prune.budget.num_non_embedding_parameters
    if total is not None and non_embedding is not None:
        raise ConfigError("two budgets", expected="num_parameters or num_non_embedding_parameters", found="both",
                          key="prune.budget")
    budget = non_embedding if total is None else total
    if not sizes and not ratios and budget is None and prune.layers.drop is None:
        raise ConfigError("no target to prune to", expected="prune.target, prune.ratio, prune.budget or "
                          "prune.layers.drop to say what is cut", found="none of them", key="prune.target")
    return resolve_target(source, sizes=sizes, ratios=ratios, budget=budget, non_embedding=non_embedding is not None,
                          divisors=dataclasses.asdict(prune.divisors),
                          dropped_layers=None if prune.layers.drop is None else tuple(prune.layers.drop))


def check_layer_metric(source: ArchSpec, target: ArchSpec, prune: PruneConfig, depth: DepthConfig) -> None:
    """Raise `ConfigError` where layers are to be dropped by a metric that the recipe does not collect."""
    num_dropped, by = source.num_layers - target.num_layers, prune.layers.by
    if not num_dropped or prune.layers.drop is not None or by == "block_influence" or prune.scores is not None:
        return
    length = num_dropped if prune.layers.contiguous else 1
    if by == "removal_order" and not depth.iterative:
        raise ConfigError("layers are to be dropped in an order that is not collected", found="false",
                          expected="importance.depth.iterative=true", key="importance.depth.iterative")
    if by != "removal_order" and (by not in depth.metrics or length not in depth.block_lengths):
        raise ConfigError("layers are to be dropped by a metric that is not collected", key="importance.depth",
                          expected=f"importance.depth.metrics=[{by}] importance.depth.block_lengths=[{length}]",
                          found=f"metrics={depth.metrics} block_lengths={depth.block_lengths}")


def check_depth(source: ArchSpec, depth: DepthConfig) -> None:
    """Raise `UserError` for blocks that do not fit the model, or a task file that is missing or of another form."""
    longest = source.num_layers - 1
    bad = [length for length in depth.block_lengths if not 1 <= length <= longest]
    if (depth.metrics and bad) or len(set(depth.block_lengths)) < len(depth.block_lengths):
        raise ConfigError("bad lengths of blocks", expected=f"different lengths from 1 to {longest}",
                          found=str(depth.block_lengths), key="importance.depth.block_lengths")
    if "accuracy" in depth.metrics:
        if depth.task is None:
            raise ConfigError("no questions to answer", expected="a task file", found="null",
                              key="importance.depth.task")
        read_questions(Path(depth.task))


def _given(node: Any) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(node).items() if value is not None}
