"""Stage `distill`: the pruned model recovers on the teacher's logits (arXiv:2407.14679, section 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import Checkpoint
from nemo_minitron.config import DistillConfig
from nemo_minitron.distill.cache import CachedTeacher
from nemo_minitron.distill.losses import LossWeights
from nemo_minitron.distill.module import DistillationModule
from nemo_minitron.distill.teacher import Teacher
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.data import prepared_data
from nemo_minitron.stages.train import student_arguments, train_stage


def run(context: Context) -> dict[str, Any]:
    """Train on `distill.tokens` tokens; every rank takes part."""
    config = context.config
    teacher, student = context.teacher(), context.student()
    context.layout.check(teacher.arch, name="teacher", seq_length=config.data.seq_length)
    module = DistillationModule(teacher=_teacher(context, teacher), weights=loss_weights(config.distill),
                                **student_arguments(context, student))
    result = train_stage(context, "distill", module, start=student, tokens=config.distill.tokens)
    return result | {"teacher_digest": teacher.weights_digest}


def _teacher(context: Context, teacher: Checkpoint) -> Teacher | CachedTeacher:
    """The model that runs in the step, or what it said on disk."""
    config = context.config
    if config.distill.cached:
        folder = context.stage_dir("cache_teacher") if config.distill.cache is None else Path(config.distill.cache)
        return CachedTeacher(folder, teacher_digest=teacher.weights_digest, k=config.distill.top_k,
                             data_digest=prepared_data(context, teacher.path, teacher.arch).digest,
                             seq_length=config.data.seq_length)
    top_k = config.distill.top_k if config.distill.loss == "top_k_kl" else None
    return Teacher(teacher.arch, teacher.path, context.layout, bf16=config.train.precision == "bf16-mixed",
                   top_k=top_k, chunk_tokens=config.train.chunk_tokens)


def loss_weights(distill: DistillConfig) -> LossWeights:
    """The recipe's choice as factors of every loss; top-k KL takes the place of KL."""
    chosen = {name: distill.kd_weight if name == distill.loss or (name, distill.loss) == ("kl", "top_k_kl") else 0.0
              for name in ("kl", "reverse_kl", "js", "mse", "cosine")}
    return LossWeights(**chosen, ce=distill.ce_weight, temperature=distill.temperature)
