"""From a recipe to finished stages: check it, see what is due, start the worker processes, tell what went wrong."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import read_json, write_json
from nemo_minitron.checkpoint.digest import read_checkpoint
from nemo_minitron.compose import load_config
from nemo_minitron.config import Config
from nemo_minitron.data.blend import check_blend
from nemo_minitron.errors import ConfigError, UserError
from nemo_minitron.evaluate.tasks import check_tasks
from nemo_minitron.generate.prompts import read_prompts
from nemo_minitron.launch import locks
from nemo_minitron.launch.processes import is_srun, placement
from nemo_minitron.launch.requeue import requeue
from nemo_minitron.launch.side_by_side import check_groups
from nemo_minitron.launch.workers import KilledAtStart, Stopped, run_workers
from nemo_minitron.parallel.layout import Layout
from nemo_minitron.report.beside import check_beside
from nemo_minitron.report.published import check_published
from nemo_minitron.search.recipe import candidates_of, expected_candidate
from nemo_minitron.stages.aligning import check_align
from nemo_minitron.stages.context import ROUND, Context
from nemo_minitron.stages.execute import execute
from nemo_minitron.stages.initialize import initial_arch
from nemo_minitron.stages.registry import STAGES, asked_stages, check_inputs, due_stages, wanted_stages
from nemo_minitron.stages.rounds import round_contexts, search_optim, search_steps
from nemo_minitron.stages.side_by_side import train_one, train_side_by_side
from nemo_minitron.stages.targets import check_depth, check_layer_metric, how_to_rank, resolved_target
from nemo_minitron.stages.teaching import intermediate_terms, relation_heads, teacher_layout
from nemo_minitron.training.budget import check_warmup, plan_phases
from nemo_minitron.training.trackers import check_loggers


def run(config: Config, arguments: list[str]) -> None:
    """Do what is missing of the recipe. `arguments` are kept for the report.

    Raises:
        UserError: also when found on a rank.
        Stopped: a signal ended the ranks; a Slurm job has been put back into the queue.
        WorkerError: anything else that ended a worker.
    """
    context = Context(config=config, command=" ".join(["minitron", *arguments]))
    check_recipe(context)
    with _lock(config.run_dir) as lock:
        _record(config, arguments)
        for round_ in round_contexts(context):
            _run_round(config, round_, lock)


def candidate(arguments: list[str]) -> None:
    """Train one candidate of a search: `rung=R [task=K] ARGUMENTS`, what a task of a job array runs.

    R counts from 1; K from 0, and is SLURM_ARRAY_TASK_ID where it is not given. Tasks may run at the same time.

    Raises:
        UserError: no such candidate, or what the search reads is not there.
        Stopped, WorkerError: as `run`.
    """
    own = {name: value for name, _, value in (argument.partition("=") for argument in arguments)
           if name in ("rung", "task")}
    config = load_config([argument for argument in arguments if argument.partition("=")[0] not in own])
    numbers = {"rung": own.get("rung", ""), "task": own.get("task", os.environ.get("SLURM_ARRAY_TASK_ID", ""))}
    for name, value in numbers.items():
        if not value.isdecimal():
            raise ConfigError("which candidate?", expected="rung=R, from 1, and task=K or SLURM_ARRAY_TASK_ID, from 0",
                              found=f"{name}={value}", key=name)
    config = dataclasses.replace(config, only=["search"])
    context = Context(config=config, command=" ".join(["minitron", "candidate", *arguments]))
    if config.rounds or "search" not in wanted_stages(context):
        raise ConfigError("no candidates", expected="a recipe with a search and without rounds",
                          found=f"{len(config.rounds)} rounds" if config.rounds else "no search", key="search")
    check_recipe(context)
    check_inputs(context, ["search"])
    with _lock(config.run_dir, shared=True) as lock, _requeued(config):
        train_one(config, context, rung=int(numbers["rung"]) - 1, task=int(numbers["task"]), lock=lock)


def _run_round(config: Config, context: Context, lock: int) -> None:
    """Do what is missing of one round of the recipe `config`."""
    asked = asked_stages(context)
    due = [stage for stage in due_stages(context) if stage in asked]
    check_inputs(context, due)
    done = [stage for stage in asked if stage not in due]
    if done:
        where = f" in {context.part}" if config.rounds else ""
        print(f"already done{where}: {', '.join(done)}", flush=True)
    if "search" in due and config.parallel.search_groups > 1:
        before = due[: due.index("search")]
        _start_ranks(config, context, before, lock)
        with _requeued(config):
            train_side_by_side(config, context, lock)
        due = due[len(before) :]
    _start_ranks(config, context, due, lock)


def _start_ranks(config: Config, context: Context, due: list[str], lock: int) -> None:
    """Run stages in worker processes, or here where none of them needs ranks."""
    processes = context.layout.world_size if any(STAGES[stage].ranks for stage in due) else 0
    if processes == 0 and (not due or not is_srun(config.cluster)):
        execute(context, due)
        return
    with _requeued(config):
        run_workers(config, due, processes=processes, command=context.command, lock=lock, round_name=context.part)


@contextmanager
def _requeued(config: Config) -> Iterator[None]:
    """Put a Slurm job back into the queue whose ranks were stopped by a signal, or killed as it was restarted."""
    try:
        yield
    except (Stopped, KilledAtStart) as error:
        requeue(config.cluster, restarted=isinstance(error, KilledAtStart))
        raise


def check_recipe(context: Context) -> None:
    """Find the user's mistakes that can be seen before anything starts.

    Raises:
        UserError: a missing or unusable teacher, a target, layout, batch or warm-up that does not fit.
    """
    config, layout = context.config, context.layout
    check_loggers(config.train.loggers)
    check_beside(config.report.beside, [round_.name for round_ in config.rounds] or [ROUND])
    if is_srun(config.cluster):
        placement(config.cluster, layout.world_size)
    if config.rounds and config.cluster.jobs:
        raise ConfigError("rounds are not run as a chain of jobs", expected="an empty list, one job for all rounds",
                          found=f"{len(config.cluster.jobs)} jobs", key="cluster.jobs")
    if "initialize" in config.stages:
        arch = initial_arch(config.model)
    else:
        arch = read_checkpoint(context.start_path()).arch
    check_blend(config.data.blend, config.data.path, config.data.kind)
    if config.distill.loss == "top_k_kl" and config.distill.top_k > arch.vocab_size:
        raise ConfigError("more tokens than the vocabulary has", expected=f"at most {arch.vocab_size}",
                          found=str(config.distill.top_k), key="distill.top_k")
    if "evaluate" in wanted_stages(context):
        check_tasks(config.evaluate)
        check_published(config.evaluate.published)
    if "generate" in wanted_stages(context):
        read_prompts(config.generate.prompts)
    if "score" in wanted_stages(context):
        check_depth(arch, config.importance.depth)
    context.check_seq_length(arch)
    layout.check(arch, name="teacher", seq_length=config.data.seq_length)
    made = {"teacher": arch}
    for round_ in round_contexts(context):
        source = "teacher" if round_.source is None else round_.source.parent.parent.name
        teacher = arch if round_.own_teacher is None else made[source]
        made[round_.part] = _check_round(round_, made[source], teacher)
        if "align" in wanted_stages(round_):
            check_align(round_, teacher, made[round_.part])


def _check_round(context: Context, source: ArchSpec, teacher: ArchSpec) -> ArchSpec:
    """Find what is wrong with a round; returns its student's architecture (of a search, the one that is expected)."""
    config, layout, wanted = context.config, context.layout, wanted_stages(context)
    for stage, tokens, parts, optim in (
            ("correct", config.correct.tokens, [], config.correct.optim(config.optim)),
            ("distill", config.distill.tokens, config.distill.phases, config.optim)):
        phases = plan_phases(tokens, parts, config.train, seq_length=config.data.seq_length, dp=layout.dp)
        if stage in wanted:
            check_warmup(optim.warmup_steps, sum(phase.steps for phase in phases))
    if "prune" not in wanted:
        return source
    how_to_rank(config.importance)
    if config.prune.student is not None:
        targets = [read_checkpoint(Path(config.prune.student)).arch]
    else:
        targets = _candidates(context, source) if config.search.is_set() else [resolved_target(source, config.prune)]
        for target in targets:
            check_layer_metric(source, target, config.prune, config.importance.depth)
    for target in targets:
        layout.check(target, name="target", seq_length=config.data.seq_length)
        if "distill" in wanted:
            _check_teaching(context, teacher, target, layout)
    if config.search.is_set() and config.parallel.search_groups > 1:
        check_groups(config)
        group = dataclasses.replace(layout, dp=layout.dp // config.parallel.search_groups)
        for target in targets:
            _check_teaching(context, teacher, target, group)
    return targets[0]


def _candidates(context: Context, source: ArchSpec) -> list[ArchSpec]:
    """The candidates of a round's search, the one that is expected first."""
    config, search = context.config, context.config.search
    if search.tokens < 1 or search.looks < 1 or search.rungs < 1 or not 0 < search.keep <= 1:
        raise ConfigError("bad search", expected="tokens, looks and rungs of 1 or more, keep above 0 and at most 1",
                          found=f"{search.tokens}, {search.looks}, {search.rungs}, {search.keep}", key="search")
    for unfit, key, found in ((config.importance.iterations > 1, "importance.iterations", config.importance.iterations),
                              (config.distill.cached, "distill.cached", True),
                              (config.prune.student is not None, "prune.student", config.prune.student)):
        if unfit:
            raise ConfigError("this does not go with a search, whose candidates share the scores and the live teacher",
                              expected="its default", found=str(found), key=key)
    target, ratio, budget = (dataclasses.asdict(node) for node in (config.prune.target, config.prune.ratio,
                                                                     config.prune.budget))
    given = [value for node in (target, ratio, budget) for value in node.values() if value is not None]
    if given or config.prune.layers.drop is not None:
        raise ConfigError("a target beside a search", expected="one of them", found="both", key="search and prune")
    check_warmup(search_optim(config).warmup_steps, search_steps(config))
    found_ = candidates_of(source, search)
    first = expected_candidate(found_, search)
    return [first, *(arch for arch in found_.candidates if arch != first)]


def _check_teaching(context: Context, teacher: ArchSpec, student: ArchSpec, layout: Layout) -> None:
    """Find what is wrong with the teacher's layout and the intermediate losses, for a student in `layout`."""
    distill = context.config.distill
    own = teacher_layout(distill, layout)
    own.check(teacher, name="teacher", seq_length=context.config.data.seq_length)
    if distill.teacher.precision == "fp8" and find_spec("transformer_engine") is None:
        raise ConfigError("an fp8 teacher needs Transformer Engine", expected="32 or bf16 where it is not installed",
                          found="fp8", key="distill.teacher.precision")
    if distill.cached and own != layout:
        raise ConfigError("a teacher on disk has no layout", expected="null", found=f"tp={own.tp} pp={own.pp}",
                          key="distill.teacher.tp or distill.teacher.pp")
    if distill.intermediate.terms and context.source is not None and context.own_teacher is None:
        raise ConfigError("intermediate losses need the model that the student was cut from", key="rounds[].teacher",
                          expected="source, or no distill.intermediate.terms", found="original")
    terms = intermediate_terms(distill, teacher, student)
    relation_heads(distill, terms, teacher, student, layout.tp)


def _record(config: Config, arguments: list[str]) -> None:
    """Write the resolved recipe and add the command to the run's list of commands."""
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.create(config.to_dict()))
    (config.run_dir / "config.yaml").write_text(text, encoding="utf-8")
    path = config.run_dir / "commands.json"
    commands = read_json(path) if path.exists() else []
    if not isinstance(commands, list):
        raise UserError("not a list of commands", expected=f"a JSON list in {path}", found=type(commands).__name__)
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(path, [*commands, {"command": ["minitron", *arguments], "started": started}])


@contextmanager
def _lock(run_dir: Path, *, shared: bool = False) -> Iterator[int]:
    """Keep other runs of the same name out, until the last process that holds the lock's descriptor has ended.

    `shared` lets others in that are shared too.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError("results cannot be written", expected="a folder that can be written to",
                          found=f"{run_dir}: {error.strerror}", key="output_dir") from None
    try:
        refusal = UserError("another run of this name is in progress", expected=f"nobody else in {run_dir}",
                            found="a held lock", key="name")
        locks.take(descriptor, refusal, shared=shared)
        yield descriptor
    finally:
        os.close(descriptor)
