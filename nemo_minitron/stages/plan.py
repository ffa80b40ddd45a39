"""The command `minitron plan`: what a recipe needs and costs, without starting anything. No stage, and no torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from nemo_minitron.arch import ArchSpec
from nemo_minitron.checkpoint.families import read_arch
from nemo_minitron.compose import load_config
from nemo_minitron.config import Config, PruneConfig
from nemo_minitron.config_rounds import RoundConfig
from nemo_minitron.cost.hardware import gpu_named
from nemo_minitron.cost.memory import Step
from nemo_minitron.cost.plan import Plan, plan_dict, plan_of
from nemo_minitron.cost.propose import fastest, overrides, proposal
from nemo_minitron.cost.recipe import Baseline, Model, Recipe, Round, Search
from nemo_minitron.cost.table import print_plan, refusal
from nemo_minitron.errors import ConfigError, LayoutError
from nemo_minitron.parallel.layout import Layout
from nemo_minitron.search.ranking import rung_steps, trained_steps
from nemo_minitron.search.recipe import candidates_of, expected_candidate
from nemo_minitron.stages.aligning import align_phases, start_of
from nemo_minitron.stages.initialize import initial_arch
from nemo_minitron.stages.targets import resolved_target
from nemo_minitron.training.budget import check_warmup, num_steps

FORMATS = ("table", "json")


def plan(arguments: list[str]) -> None:
    """Print the plan of the recipe that `arguments` describe; `format=json` prints JSON.

    Raises:
        LayoutError: a layout that does not fit the model, or (once the plan is printed) the GPU.
        UserError: any other mistake in the recipe.
    """
    chosen = [argument.partition("=")[2] for argument in arguments if argument.startswith("format=")]
    form = chosen[-1] if chosen else "table"
    if form not in FORMATS:
        raise ConfigError("unknown format", expected=", ".join(FORMATS), found=repr(form), key="format")
    config = load_config([argument for argument in arguments if not argument.startswith("format=")])
    recipe = planned(config)
    found = plan_of(recipe)
    better = None if found.fits else proposal(recipe)
    scaling = [(gpus, fastest(recipe, gpus)) for gpus in config.plan.scaling]
    if form == "json":
        _print_json(found, better, scaling)
    else:
        print_plan(found, scaling)
    if not found.fits:
        raise LayoutError("the layout does not fit the GPU", key="parallel and train.micro_batch_size",
                          **refusal(found, better))


def planned(config: Config) -> Recipe:
    """The recipe as the planner sees it.

    Raises:
        UserError: a missing teacher, a target, search, layout, batch or warm-up that does not fit.
    """
    train, parallel = config.train, config.parallel
    teacher = Model(name="teacher", arch=_teacher_arch(config))
    layout = Layout(tp=parallel.tp, pp=parallel.pp, dp=parallel.dp, sequence_parallel=parallel.sequence_parallel)
    simple = config.distill.loss == "kl" and config.distill.temperature == 1
    step = Step(seq_length=config.data.seq_length, global_batch_size=train.global_batch_size,
                micro_batch_size=train.micro_batch_size, bf16=train.precision == "bf16-mixed",
                distributed_optimizer=parallel.distributed_optimizer, chunk_tokens=train.chunk_tokens,
                simple_loss=simple)
    if train.global_batch_size % (train.micro_batch_size * layout.dp):
        raise ConfigError("batch sizes do not divide", key="train.global_batch_size",
                          expected="global_batch_size to be a multiple of micro_batch_size * dp",
                          found=f"{train.global_batch_size} and {train.micro_batch_size} * {layout.dp}")
    baseline, correct = config.plan.baseline, "correct" in config.stages
    if correct:
        _check_steps(config, config.correct.tokens, config.correct.optim(config.optim).warmup_steps)
    recipe = Recipe(
        name=config.name, teacher=teacher, rounds=_rounds(config, teacher), step=step, layout=layout,
        gpu=gpu_named(config.plan.gpu), utilisation=config.plan.utilisation,
        controls=tuple(config.controls), scratch_ratio=config.scratch_until.max_ratio,
        cached=config.distill.cached, writes_cache="cache_teacher" in config.stages,
        aligned=_aligned(config, step), correct_tokens=config.correct.tokens if correct else 0,
        score_samples=config.importance.num_samples if "score" in config.stages else 0,
        score_micro_batch=config.importance.micro_batch_size,
        baseline=None if baseline.tokens is None else Baseline(name=baseline.name or "no name given",
                                                               tokens=baseline.tokens),
    )
    for model in recipe.models():
        layout.check(model.arch, name=model.name, seq_length=step.seq_length)
    return recipe


def _aligned(config: Config, step: Step) -> tuple[tuple[int, Step], ...]:
    """Tokens and step of the alignment's trainings; none where there is no such stage, or it tunes no student."""
    if "align" not in config.stages or start_of(config) not in ("distill", "prune"):
        return ()
    return tuple((phase.tokens, dataclasses.replace(step, simple_loss=True, **phase.of(Step)))
                 for phase in align_phases(config))


def _teacher_arch(config: Config) -> ArchSpec:
    """What lies in `teacher.path`, else the shape in `model`."""
    if config.teacher.path is not None and "initialize" not in config.stages:
        return read_arch(Path(config.teacher.path))
    return initial_arch(config.model)


def rounds_of(config: Config) -> list[RoundConfig]:
    """The recipe's rounds; one made of `prune`, `search` and `distill` where it lists none and prunes."""
    if config.rounds or "prune" not in config.stages:
        return config.rounds
    prune = config.prune
    return [RoundConfig(name="round1", search=config.search if config.search.is_set() else None, target=prune.target,
                        ratio=prune.ratio, budget=prune.budget, drop=prune.layers.drop)]


def _rounds(config: Config, teacher: Model) -> tuple[Round, ...]:
    made = {"teacher": teacher}
    rounds = []
    for round_ in rounds_of(config):
        source = made[round_.source]  # composing has checked that it is there
        search, arch = _student(config, round_, source.arch)
        student = Model(name=round_.name if config.rounds else config.name, arch=arch)
        tokens = config.distill.tokens if round_.distill.tokens is None else round_.distill.tokens
        warmup = round_.distill.warmup_steps
        _check_steps(config, tokens, config.optim.warmup_steps if warmup is None else warmup)
        whose = teacher if round_.teacher == "original" else source
        rounds.append(Round(name=round_.name, source=source, teacher=whose, student=student, tokens=tokens,
                            search=search))
        made[round_.name] = student
    return tuple(rounds)


def _student(config: Config, round_: RoundConfig, source: ArchSpec) -> tuple[Search | None, ArchSpec]:
    """The candidates of a round that searches and the one to go on with, or the target that the round names."""
    if round_.search is None:
        layers = dataclasses.replace(config.prune.layers, drop=round_.drop)
        prune: PruneConfig = dataclasses.replace(config.prune, target=round_.target, ratio=round_.ratio,
                                                 budget=round_.budget, layers=layers)
        return None, resolved_target(source, prune)
    search, found = round_.search, candidates_of(source, round_.search)
    ends = rung_steps(num_steps(search.tokens, global_batch_size=config.train.global_batch_size,
                                seq_length=config.data.seq_length), rungs=search.rungs, keep=search.keep)
    steps, finalists = trained_steps(len(found.candidates), ends, search.keep)
    planned = Search(num_combinations=found.num_combinations, ruled_out=found.ruled_out, candidates=found.candidates,
                     tokens=search.tokens, steps=steps, num_finalists=finalists)
    return planned, expected_candidate(found, search)


def _check_steps(config: Config, tokens: int, warmup_steps: int) -> None:
    check_warmup(warmup_steps, num_steps(tokens, global_batch_size=config.train.global_batch_size,
                                         seq_length=config.data.seq_length))


def _print_json(found: Plan, better: Plan | None, scaling: list[tuple[int, Plan | None]]) -> None:
    rows = [{"gpus": gpus, "layout": None} if plan is None else
            {"gpus": gpus, "layout": overrides(plan), "seconds": plan.total("seconds"),
             "gpu_hours": plan.total("gpu_hours")} for gpus, plan in scaling]
    print(json.dumps(plan_dict(found) | {"proposal": None if better is None else overrides(better), "scaling": rows},
                     indent=2))
