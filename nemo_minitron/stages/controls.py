"""Stages `ce` and `scratch`: what the same tokens give without distillation, and without the pruned weights."""

from __future__ import annotations

from typing import Any

from nemo_minitron.checkpoint.digest import write_random
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.train import student_arguments, train_stage
from nemo_minitron.training.module import TrainingModule


def run_ce(context: Context) -> dict[str, Any]:
    """Train the pruned model by cross-entropy on `distill.tokens` tokens; every rank takes part."""
    student = context.student()
    module = TrainingModule(**student_arguments(context, student))
    return train_stage(context, "ce", module, start=student, tokens=context.config.distill.tokens,
                       phases=context.config.distill.phases)


def run_scratch(context: Context) -> dict[str, Any]:
    """Train the pruned architecture from random weights by cross-entropy on `distill.tokens` tokens."""
    student = context.student()
    initial = context.stage_dir("scratch") / "initial"
    if context.rank == 0 and not initial.exists():
        write_random(student.arch, initial, tokenizer_directory=student.path, seed=context.config.seed)
    context.barrier()
    start = context.read(initial)
    module = TrainingModule(**student_arguments(context, start))
    return train_stage(context, "scratch", module, start=start, tokens=context.config.distill.tokens,
                       phases=context.config.distill.phases)
