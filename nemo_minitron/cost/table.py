"""A plan as tables for the terminal (rich)."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from nemo_minitron.cost.flops import training_flops
from nemo_minitron.cost.memory import KINDS
from nemo_minitron.cost.plan import Family, Plan
from nemo_minitron.cost.propose import overrides
from nemo_minitron.cost.recipe import Model, Recipe
from nemo_minitron.cost.step_time import PARTS

GIB = 2**30


def print_plan(plan: Plan, scaling: list[tuple[int, Plan | None]]) -> None:
    """Print all tables on stdout, as wide as they are where it is no terminal."""
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    console.print(Group(*_parts(plan, scaling)))


def _parts(plan: Plan, scaling: list[tuple[int, Plan | None]]) -> Iterable[RenderableType]:
    recipe = plan.recipe
    yield Text(_headline(recipe))
    yield _models(recipe)
    if any(round_.search for round_ in recipe.rounds):
        yield _searches(recipe)
    yield _memory(plan)
    yield _cost(plan)
    yield _step(plan)
    if plan.family is not None:
        yield _family(plan.family)
    if scaling:
        yield scaling_table(scaling)


def _headline(recipe: Recipe) -> str:
    layout, step = recipe.layout, recipe.step
    sequence = ", sequence parallel" if layout.sequence_parallel else ""
    sharded = ", distributed optimizer" if step.distributed_optimizer else ""
    return (f"{recipe.name}: {layout.world_size} x {recipe.gpu.name}, tp {layout.tp} x pp {layout.pp} x dp {layout.dp}"
            f"{sequence}{sharded}; {step.global_batch_size} samples of {step.seq_length} tokens a step, micro-batch "
            f"{step.micro_batch_size}, {'bf16-mixed' if step.bf16 else 'fp32'}")


def _table(title: str, *columns: str, text: int = 1) -> Table:
    """A table whose first `text` columns are text and whose others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < text else "right")
    return table


def _models(recipe: Recipe) -> Table:
    table = _table("models", "model", "layers", "hidden", "FFN", "heads", "groups", "parameters", "non-embedding",
                   "FLOPs/step*", "tokens")
    tokens = {round_.student.name: round_.tokens for round_ in recipe.rounds}
    for model in recipe.models():
        table.add_row(*_model_row(model, recipe), count(tokens.get(model.name)))
    table.caption = "* forward and backward of this model alone, attention over all positions"
    return table


def _model_row(model: Model, recipe: Recipe) -> list[str]:
    arch, step = model.arch, recipe.step
    flops = training_flops(arch, samples=step.global_batch_size, seq_length=step.seq_length)
    sizes = (arch.num_layers, arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads, arch.num_query_groups)
    return [model.name, *map(str, sizes), f"{arch.num_parameters():,}", f"{arch.num_non_embedding_parameters():,}",
            f"{flops:.2e}"]


def _searches(recipe: Recipe) -> Table:
    table = _table("search", "round", "combinations", "candidates", "tokens each", "to the end",
                   "ruled out by each constraint alone")
    for round_ in recipe.rounds:
        if round_.search is not None:
            search = round_.search
            ruled_out = ", ".join(f"{name} {number:,}" for name, number in search.ruled_out.items() if number)
            table.add_row(round_.name, f"{search.num_combinations:,}", f"{len(search.candidates):,}",
                          count(search.tokens), f"{search.num_finalists:,}", ruled_out or "none")
    return table


def _memory(plan: Plan) -> Table:
    table = _table(f"memory of the fullest GPU, GiB (of {plan.recipe.gpu.memory_bytes / GIB:.1f})", "round", "stage",
                   *KINDS, "total", text=2)
    for stage in plan.stages:
        memory = stage.memory
        table.add_row(stage.round, stage.stage, *(f"{getattr(memory, kind) / GIB:.2f}" for kind in KINDS),
                      f"{memory.total / GIB:.1f}")
    return table


def _cost(plan: Plan) -> Table:
    stated = f"GPU-hours at {plan.recipe.utilisation:.0%}"
    table = _table("cost", "round", "stage", "what", "tokens", "steps", "FLOPs/step", "FLOPs", "hours", "GPU-hours",
                   "of peak", stated, text=3)
    for stage in plan.stages:
        steps = (f"{stage.steps:,}", f"{stage.flops_per_step:.2e}") if stage.steps else ("", "")
        table.add_row(stage.round, stage.stage, stage.what, count(stage.tokens), *steps, f"{stage.flops:.2e}",
                      hours(stage.seconds / 3600), hours(stage.gpu_hours), f"{stage.utilisation:.0%}",
                      hours(stage.gpu_hours_at_utilisation))
    table.add_section()
    table.add_row("all", "", "", "", "", "", f"{plan.total('flops'):.2e}", hours(plan.total("seconds") / 3600),
                  hours(plan.total("gpu_hours")), "", hours(plan.total("gpu_hours_at_utilisation")))
    table.caption = "FLOPs with the teacher's forward; hours by the step-time model of docs/scaling.md"
    return table


def _step(plan: Plan) -> Table:
    table = _table("seconds of a step", "round", "stage", *(part.replace("_", " ") for part in PARTS), "total", text=2)
    for stage in plan.stages:
        seconds = stage.step_seconds
        if seconds is not None:
            table.add_row(stage.round, stage.stage, *(f"{getattr(seconds, part):.3f}" for part in PARTS),
                          f"{seconds.total:.3f}")
    return table


def _family(family: Family) -> Table:
    table = _table(f"against training each model from scratch on {count(int(family.baseline_tokens))} tokens "
                   f"({family.baseline})", "", "")
    for name, ratio in family.fewer_tokens.items():
        corrected = family.fewer_tokens_with_correction[name]
        also = "" if corrected == ratio else f" ({corrected:.1f}x with the correction's)"
        table.add_row(f"fewer tokens, {name}", f"{ratio:.1f}x{also}")
    table.add_row("FLOPs saved over the family, students' steps", f"{family.saving:.2f}x")
    table.add_row("with the teacher's forward", f"{family.saving_with_teacher_forward:.2f}x")
    table.add_row("with correction, scoring and search too", f"{family.saving_with_all:.2f}x")
    return table


def scaling_table(scaling: list[tuple[int, Plan | None]]) -> Table:
    """The fastest layout for each number of GPUs."""
    table = _table("fastest layout for each number of GPUs", "GPUs", "layout", "hours", "GPU-hours", "of peak",
                   "fullest GPU, GiB", text=2)
    for gpus, plan in scaling:
        if plan is None:
            table.add_row(str(gpus), "none fits", "", "", "", "")
            continue
        peak = plan.total("flops") / (plan.total("gpu_hours") * 3600 * plan.recipe.gpu.peak(bf16=plan.recipe.step.bf16))
        table.add_row(str(gpus), _layout(plan), hours(plan.total("seconds") / 3600), hours(plan.total("gpu_hours")),
                      f"{peak:.0%}", f"{plan.fullest.memory.total / GIB:.1f}")
    return table


def _layout(plan: Plan) -> str:
    layout, step = plan.recipe.layout, plan.recipe.step
    return f"tp {layout.tp} x pp {layout.pp} x dp {layout.dp}, micro-batch {step.micro_batch_size}"


def refusal(plan: Plan, better: Plan | None) -> dict[str, str]:
    """`expected` and `found` of the error for a layout that does not fit, with one that does."""
    stage, gpu = plan.fullest, plan.recipe.gpu
    parts = ", ".join(f"{kind} {getattr(stage.memory, kind) / GIB:.1f}" for kind in KINDS)
    found = f"{stage.memory.total / GIB:.1f} GiB in stage {stage.stage} ({parts})"
    where = "no layout of up to 2048 GPUs that does" if better is None else f"as with {overrides(better)}"
    return {"expected": f"at most {gpu.memory_bytes / GIB:.1f} GiB on a {gpu.name}, {where}", "found": found}


def hours(number: float) -> str:
    """With three digits, or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def count(number: int | None) -> str:
    """1.887B, 94B, 3.8T; empty for None."""
    if number is None:
        return ""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.4g}{letter}"
    return str(number)
