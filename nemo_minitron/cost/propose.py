"""The fastest layout that fits: every combination of degrees and micro-batch sizes for a number of GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from nemo_minitron.cost.memory import Step, training_memory
from nemo_minitron.cost.plan import Plan, plan_of
from nemo_minitron.cost.recipe import Recipe
from nemo_minitron.errors import UserError
from nemo_minitron.parallel.layout import Layout

MOST_GPUS = 2048
TENSOR_DEGREES = (1, 2, 4, 8)
PIPELINE_DEGREES = (1, 2, 4, 8, 16)
MICRO_BATCHES = (1, 2, 4, 8)


def fastest(recipe: Recipe, world_size: int) -> Plan | None:
    """The plan of the layout on `world_size` GPUs that fits and takes the least time, or None where none fits.

    Tensor parallelism stays inside a node, with sequence parallelism; the optimizer is distributed. Precision, batch
    and samples are the recipe's.
    """
    plans = [plan_of(dataclasses.replace(recipe, layout=layout, step=step))
             for layout, step in _choices(recipe, world_size) if _fits(recipe, layout, step)]
    return min((plan for plan in plans if plan.fits), key=lambda plan: plan.total("seconds"), default=None)


def proposal(recipe: Recipe) -> Plan | None:
    """The fastest plan on as many GPUs as the recipe asks for, else on twice as many, and so on; None at last."""
    world_size = recipe.layout.world_size
    while world_size <= MOST_GPUS:
        plan = fastest(recipe, world_size)
        if plan is not None:
            return plan
        world_size *= 2
    return None


def overrides(plan: Plan) -> str:
    """The plan's layout as overrides of the command line."""
    layout, step = plan.recipe.layout, plan.recipe.step
    return (f"parallel.tp={layout.tp} parallel.pp={layout.pp} parallel.dp={layout.dp} "
            f"parallel.sequence_parallel={str(layout.sequence_parallel).lower()} "
            f"parallel.distributed_optimizer={str(step.distributed_optimizer).lower()} "
            f"train.micro_batch_size={step.micro_batch_size}")


def _choices(recipe: Recipe, world_size: int) -> Iterator[tuple[Layout, Step]]:
    step = recipe.step
    for tp in TENSOR_DEGREES:
        for pp in PIPELINE_DEGREES:
            if tp > recipe.gpu.gpus_per_node or world_size % (tp * pp):
                continue
            layout = Layout(tp=tp, pp=pp, dp=world_size // (tp * pp), sequence_parallel=tp > 1)
            if not _allowed(recipe, layout):
                continue
            for micro in MICRO_BATCHES:
                if step.global_batch_size % (micro * layout.dp) == 0:
                    yield layout, dataclasses.replace(step, micro_batch_size=micro, distributed_optimizer=True)


def _allowed(recipe: Recipe, layout: Layout) -> bool:
    try:
        for student, teacher in recipe.trainings():
            for arch in filter(None, (student, teacher)):
                layout.check(arch, name="model", seq_length=recipe.step.seq_length)
    except UserError:
        return False
    return True


def _fits(recipe: Recipe, layout: Layout, step: Step) -> bool:
    return all(training_memory(student, layout, step, teacher=teacher).total <= recipe.gpu.memory_bytes
               for student, teacher in recipe.trainings())
