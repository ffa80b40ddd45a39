"""What a recipe costs: every stage's memory, FLOPs, time and GPU-hours, and the family against scratch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from nemo_minitron.arch import ArchSpec
from nemo_minitron.cost.flops import flops_per_token, forward_flops, training_flops
from nemo_minitron.cost.memory import KINDS, Memory, Step, forward_memory, training_memory
from nemo_minitron.cost.recipe import Recipe, Round, Search
from nemo_minitron.cost.step_time import PARTS, Machine, Seconds, forward_seconds, step_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage. `step_seconds` is None where no steps are made; `seconds` are those of the whole stage.

    `gpu_hours` follow from `seconds`, `gpu_hours_at_utilisation` from FLOPs and the recipe's stated part of the peak.
    """

    round: str
    stage: str
    what: str
    tokens: int
    steps: int
    flops: float
    flops_per_step: float
    memory: Memory
    step_seconds: Seconds | None
    seconds: float
    gpu_hours: float
    gpu_hours_at_utilisation: float
    utilisation: float
    """Part of the GPUs' peak that `flops` in `seconds` are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The recipe against training the teacher and every student from scratch on the baseline's tokens each.

    Savings are quotients of FLOPs, all with the teacher's own training on both sides: `saving` counts the students'
    steps only (arXiv:2407.14679, section 4.1), `saving_with_teacher_forward` also the teacher's forward passes,
    `saving_with_all` correction, scoring and search too. `fewer_tokens` of each round is the baseline's tokens over
    those of its distillation, `fewer_tokens_with_correction` over these and the tokens of the teacher's correction.
    """

    baseline: str
    baseline_tokens: float
    saving: float
    saving_with_teacher_forward: float
    saving_with_all: float
    fewer_tokens: dict[str, float]
    fewer_tokens_with_correction: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole of it; `fits` says whether the fullest stage has room on the GPU."""

    recipe: Recipe
    stages: tuple[StageCost, ...]
    family: Family | None

    @property
    def fullest(self) -> StageCost:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def fits(self) -> bool:
        """Whether every stage has room on the GPU."""
        return self.fullest.memory.total <= self.recipe.gpu.memory_bytes

    def total(self, name: str) -> float:
        """Sum over stages of `flops`, `seconds`, `gpu_hours` or `gpu_hours_at_utilisation`."""
        return float(sum(getattr(stage, name) for stage in self.stages))


def plan_of(recipe: Recipe) -> Plan:
    """Costs of all stages, in the order in which they would run."""
    stages = []
    if recipe.correct_tokens:
        stages.append(_training(recipe, "", "correct", recipe.teacher.name, [recipe.teacher.arch], None,
                                recipe.correct_tokens))
    for round_ in recipe.rounds:
        stages += _round(recipe, round_)
    return Plan(recipe=recipe, stages=tuple(stages), family=_family(recipe, stages))


def _round(recipe: Recipe, round_: Round) -> list[StageCost]:
    stages, teacher = [], recipe.streamed(round_)
    if recipe.score_samples:
        stages.append(_forward(recipe, round_, "score", round_.source.name, round_.source.arch, recipe.score_samples,
                               bf16=False))
    if round_.search is not None and round_.search.tokens:
        stages.append(_search(recipe, round_.name, round_.search, teacher))
    if recipe.writes_cache:
        samples = math.ceil(round_.tokens / recipe.step.seq_length)
        stages.append(_forward(recipe, round_, "cache_teacher", round_.teacher.name, round_.teacher.arch, samples,
                               bf16=recipe.step.bf16))
    stages.append(_training(recipe, round_.name, "distill", f"{round_.student.name} from {round_.teacher.name}",
                            [round_.student.arch], teacher, round_.tokens))
    tokens = {"scratch_until": round(round_.tokens * recipe.scratch_ratio)}  # at most
    stages += [_training(recipe, round_.name, control, round_.student.name, [round_.student.arch], None,
                         tokens.get(control, round_.tokens)) for control in recipe.controls]
    return stages + [_training(dataclasses.replace(recipe, step=step), round_.name, "align", round_.student.name,
                               [round_.student.arch], None, tokens) for tokens, step in recipe.aligned]


def _search(recipe: Recipe, name: str, search: Search, teacher: ArchSpec | None) -> StageCost:
    """All candidates one after another; those that go on from rung to rung are taken to be of mean size."""
    count, last = len(search.candidates), search.num_finalists
    what = f"{count} candidates" + (f", {last} to the end" if last < count else "")
    return _training(recipe, name, "search", what, list(search.candidates), teacher,
                     search.steps * recipe.step.global_batch_size * recipe.step.seq_length)


def _training(recipe: Recipe, name: str, stage: str, what: str, students: list[ArchSpec], teacher: ArchSpec | None,
              tokens: int) -> StageCost:
    """`students` trained one after another on `tokens` together; memory is the fullest's, step figures are means."""
    step, layout, gpu = recipe.step, recipe.layout, recipe.gpu
    samples = step.global_batch_size
    steps = math.ceil(tokens / (samples * step.seq_length))
    per_step = sum(training_flops(student, samples=samples, seq_length=step.seq_length, teacher=teacher)
                   for student in students) / len(students)
    took = Seconds()
    for student in students:
        took = took.plus(step_seconds(student, layout, step, gpu, teacher=teacher).times(1 / len(students)))
    memory = max((training_memory(student, layout, step, teacher=teacher) for student in students),
                 key=lambda found: found.total)
    return _stage(recipe, round=name, stage=stage, what=what, tokens=tokens, steps=steps,
                  flops=per_step * steps, flops_per_step=per_step, memory=memory, step_seconds=took,
                  seconds=took.total * steps)


def _forward(recipe: Recipe, round_: Round, stage: str, what: str, arch: ArchSpec, samples: int, *,
             bf16: bool) -> StageCost:
    """A forward pass over `samples` samples: scoring in fp32 (`stages/score.py`), or what the teacher says."""
    step = Step(seq_length=recipe.step.seq_length, global_batch_size=samples, bf16=bf16,
                micro_batch_size=recipe.score_micro_batch)
    return _stage(recipe, round=round_.name, stage=stage, what=what, tokens=samples * step.seq_length, steps=0,
                  flops=forward_flops(arch, samples=samples, seq_length=step.seq_length), flops_per_step=0.0,
                  memory=forward_memory(arch, recipe.layout, tokens=step.micro_tokens, itemsize=step.itemsize),
                  step_seconds=None,
                  seconds=forward_seconds(Machine(gpu=recipe.gpu, layout=recipe.layout, bf16=bf16), arch, step))


def _stage(recipe: Recipe, *, flops: float, seconds: float, **known: Any) -> StageCost:
    gpus, peak = recipe.layout.world_size, recipe.gpu.peak(bf16=recipe.step.bf16)
    return StageCost(flops=flops, seconds=seconds, gpu_hours=seconds * gpus / 3600,
                     gpu_hours_at_utilisation=flops / (peak * recipe.utilisation) / 3600,
                     utilisation=flops / (seconds * gpus * peak) if seconds else 0.0, **known)


def _family(recipe: Recipe, stages: list[StageCost]) -> Family | None:
    if recipe.baseline is None:
        return None
    length, tokens = recipe.step.seq_length, recipe.baseline.tokens

    def training(arch: ArchSpec, tokens: float) -> float:
        return training_flops(arch, samples=1, seq_length=length) * tokens / length

    scratch = sum(training(model.arch, tokens) for model in recipe.models())
    teacher = training(recipe.teacher.arch, tokens)
    students = sum(training(round_.student.arch, round_.tokens) for round_ in recipe.rounds)
    forward = sum(flops_per_token(round_.teacher.arch, seq_length=length) * round_.tokens for round_ in recipe.rounds)
    everything = sum(stage.flops for stage in stages if stage.stage not in recipe.controls)
    return Family(
        baseline=recipe.baseline.name, baseline_tokens=tokens, saving=scratch / (teacher + students),
        saving_with_teacher_forward=scratch / (teacher + students + forward),
        saving_with_all=scratch / (teacher + everything),
        fewer_tokens={round_.name: tokens / round_.tokens for round_ in recipe.rounds},
        fewer_tokens_with_correction={round_.name: tokens / (round_.tokens + recipe.correct_tokens)
                                      for round_ in recipe.rounds},
    )


def plan_dict(plan: Plan) -> dict[str, Any]:
    """Plain JSON data of a plan."""
    recipe = plan.recipe
    step = dataclasses.asdict(recipe.step)
    return {
        "name": recipe.name, "gpu": dataclasses.asdict(recipe.gpu), "step": step,
        "layout": dataclasses.asdict(recipe.layout) | {"world_size": recipe.layout.world_size},
        "models": [{"name": model.name, "arch": model.arch.to_dict(), "num_parameters": model.arch.num_parameters(),
                    "num_non_embedding_parameters": model.arch.num_non_embedding_parameters(),
                    "training_flops_per_step": training_flops(model.arch, samples=recipe.step.global_batch_size,
                                                              seq_length=recipe.step.seq_length)}
                   for model in recipe.models()],
        "rounds": [_round_dict(round_) for round_ in recipe.rounds],
        "stages": [_stage_dict(stage) for stage in plan.stages],
        "total": {name: plan.total(name) for name in ("flops", "seconds", "gpu_hours", "gpu_hours_at_utilisation")},
        "utilisation": recipe.utilisation,
        "family": None if plan.family is None else dataclasses.asdict(plan.family),
        "fits": plan.fits,
    }


def _round_dict(round_: Round) -> dict[str, Any]:
    search = round_.search
    found = None if search is None else {
        "num_combinations": search.num_combinations, "num_candidates": len(search.candidates), "tokens": search.tokens,
        "num_finalists": search.num_finalists, "steps": search.steps, "ruled_out": dict(search.ruled_out),
        "candidates": [arch.to_dict() | {"num_parameters": arch.num_parameters()} for arch in search.candidates]}
    return {"name": round_.name, "source": round_.source.name, "teacher": round_.teacher.name,
            "student": round_.student.name, "tokens": round_.tokens, "search": found}


def _stage_dict(stage: StageCost) -> dict[str, Any]:
    plain = {field.name: getattr(stage, field.name) for field in dataclasses.fields(stage)}
    plain["memory"] = {kind: getattr(stage.memory, kind) for kind in (*KINDS, "total", "stage")}
    if stage.step_seconds is not None:
        plain["step_seconds"] = {part: getattr(stage.step_seconds, part) for part in (*PARTS, "total")}
    return plain
