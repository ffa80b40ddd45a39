"""Stage `distill`: the pruned model recovers on the teacher's logits (arXiv:2407.14679, section 3)."""

from __future__ import annotations

from typing import Any

from nemo_minitron.distill.module import DistillationModule
from nemo_minitron.distill.teacher import Teacher
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.train import student_arguments, train_stage


def run(context: Context) -> dict[str, Any]:
    """Train on `distill.tokens` tokens; every rank takes part."""
    config = context.config
    teacher, student = context.teacher(), context.student()
    context.layout.check(teacher.arch, name="teacher", seq_length=config.data.seq_length)
    module = DistillationModule(
        teacher=Teacher(teacher.arch, teacher.path, context.layout, bf16=config.train.precision == "bf16-mixed"),
        kl_weight=config.distill.kl_weight, ce_weight=config.distill.ce_weight, **student_arguments(context, student),
    )
    result = train_stage(context, "distill", module, start=student, tokens=config.distill.tokens)
    return result | {"teacher_digest": teacher.weights_digest}
