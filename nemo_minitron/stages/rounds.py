"""A recipe's rounds, and the candidates of a search, as recipes of their own, each in its part of the run's folder."""

from __future__ import annotations

import dataclasses
from typing import Any

from nemo_minitron.config import Config, OptimConfig, StopConfig
from nemo_minitron.config_rounds import BudgetConfig, RatioConfig, RoundConfig, SearchConfig, TargetConfig
from nemo_minitron.stages.context import Context
from nemo_minitron.training.budget import num_steps

BEFORE_ROUNDS = ("initialize", "correct")
"""Stages that make the teacher of all rounds; the first round has them."""


def round_contexts(context: Context) -> list[Context]:
    """One context for each round of the recipe, in order; the one given where it lists none."""
    config = context.config
    if not config.rounds:
        return [context]
    names = tuple(round_.name for round_ in config.rounds)
    found = []
    for index, round_ in enumerate(config.rounds):
        source = None if round_.source == "teacher" else config.run_dir / round_.source / "distill" / "checkpoint"
        found.append(dataclasses.replace(
            context, config=round_recipe(config, round_), part=round_.name, round_names=names, source=source,
            own_teacher=source if round_.teacher == "source" else None,
            elsewhere=dict.fromkeys(BEFORE_ROUNDS, names[0]) if index else {}))
    return found


def round_context(context: Context, name: str) -> Context:
    """The context of one round, by its name."""
    return next(found for found in round_contexts(context) if found.part == name)


def round_recipe(config: Config, round_: RoundConfig) -> Config:
    """The recipe with the round's target or search and settings in place of the shared ones, and without rounds."""
    own = {name: value for name, value in dataclasses.asdict(round_.distill).items()
           if value is not None and name != "tokens"}
    distill = config.distill
    if round_.distill.tokens is not None:
        distill = dataclasses.replace(distill, tokens=round_.distill.tokens, phases=[])
    layers = dataclasses.replace(config.prune.layers, drop=round_.drop)
    prune = dataclasses.replace(config.prune, target=round_.target, ratio=round_.ratio, budget=round_.budget,
                                layers=layers)
    return dataclasses.replace(config, rounds=[], prune=prune, search=round_.search or SearchConfig(), distill=distill,
                               optim=dataclasses.replace(config.optim, **own), correct=_correct(config))


def _correct(config: Config) -> Any:
    """The node `correct` with all of its numbers, since the round's own optimizer is not meant for it."""
    optim = config.correct.optim(config.optim)
    return dataclasses.replace(config.correct, lr=optim.lr, min_lr=optim.min_lr, warmup_steps=optim.warmup_steps)


def pruned_to(context: Context, sizes: dict[str, int], part: str, **changes: Any) -> Context:
    """The same recipe with `sizes` as its target, in a folder of its own, pruned from the same scores.

    `changes` are further nodes of the recipe.
    """
    prune = dataclasses.replace(context.config.prune, target=TargetConfig(**sizes), ratio=RatioConfig(),
                                budget=BudgetConfig(),
                                layers=dataclasses.replace(context.config.prune.layers, drop=None))
    config = dataclasses.replace(context.config, prune=prune, search=SearchConfig(), controls=[], only=[], **changes)
    shared = dict.fromkeys((*BEFORE_ROUNDS, "score"), context.part)
    return dataclasses.replace(context, config=config, part=f"{context.part}/{part}",
                               elsewhere={**shared, **context.elsewhere})


def search_steps(config: Config) -> int:
    """Steps that every candidate is trained for."""
    return num_steps(config.search.tokens, global_batch_size=config.train.global_batch_size,
                     seq_length=config.data.seq_length)


def search_optim(config: Config) -> OptimConfig:
    """That of the short distillation: the recipe's, with a warm-up that fits."""
    warmup = config.search.warmup_steps
    return dataclasses.replace(config.optim, warmup_steps=min(config.optim.warmup_steps, search_steps(config) // 5)
                               if warmup is None else warmup)


def candidate_context(context: Context, name: str, sizes: dict[str, int]) -> Context:
    """A candidate's recipe: pruned to `sizes`, then distilled on `search.tokens` tokens."""
    config = context.config
    steps = search_steps(config)
    train = dataclasses.replace(config.train, eval_every_steps=max(1, steps // config.search.looks), keep_best=False,
                                stop=StopConfig())
    found = pruned_to(context, sizes, f"search/{name}", stages=_stages(config, ["prune", "distill"]), train=train,
                      optim=search_optim(config),
                      distill=dataclasses.replace(config.distill, tokens=config.search.tokens, phases=[]))
    return dataclasses.replace(found, looks_count=True)


def compared_context(context: Context, sizes: dict[str, int]) -> Context:
    """The recipe of a candidate that was not chosen, distilled as the chosen one is."""
    return pruned_to(context, sizes, "compare", stages=_stages(context.config, ["prune", "distill", "evaluate"]))


def _stages(config: Config, stages: list[str]) -> list[str]:
    """`stages`, and those that say where the teacher is."""
    return [*[stage for stage in BEFORE_ROUNDS if stage in config.stages], *stages]
