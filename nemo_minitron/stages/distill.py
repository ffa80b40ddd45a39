"""Stage `distill`: the pruned model recovers on the teacher's logits (arXiv:2407.14679, section 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import Checkpoint, Plan, read_json
from nemo_minitron.config import DistillConfig
from nemo_minitron.distill.cache import CachedTeacher
from nemo_minitron.distill.intermediate import IntermediateLosses
from nemo_minitron.distill.layer_map import Term
from nemo_minitron.distill.losses import LossWeights
from nemo_minitron.distill.module import DistillationModule
from nemo_minitron.distill.teacher import Placement, Teacher
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.data import prepared_data
from nemo_minitron.stages.teaching import intermediate_terms, relation_heads, teacher_layout, teacher_precision
from nemo_minitron.stages.train import student_arguments, train_stage
from nemo_minitron.training.snapshots import ExchangeTeacher


def run(context: Context) -> dict[str, Any]:
    """Train on `distill.tokens` tokens; every rank takes part."""
    config = context.config
    teacher, student = context.teacher(), context.student()
    terms = intermediate_terms(config.distill, teacher.arch, student.arch)
    source = _teacher(context, teacher, student, terms)
    module = DistillationModule(
        teacher=source, teacher_arch=teacher.arch, weights=loss_weights(config.distill),
        intermediate=_intermediate(context, terms, teacher, student), kept_channels=_kept_channels(context),
        **student_arguments(context, student))
    callbacks = []
    if config.distill.teacher.snapshots is not None and isinstance(source, Teacher):
        callbacks.append(ExchangeTeacher(
            Path(config.distill.teacher.snapshots), every_steps=config.distill.teacher.exchange_every_steps,
            record=context.stage_dir("distill") / "teachers.jsonl", label="distill"))
    result = train_stage(context, "distill", module, start=student, tokens=config.distill.tokens,
                         phases=config.distill.phases, callbacks=callbacks)
    if isinstance(source, Teacher):
        source.close()
    return result | {"teacher_digest": teacher.weights_digest}


def _teacher(context: Context, teacher: Checkpoint, student: Checkpoint, terms: list[Term]) -> Teacher | CachedTeacher:
    """The model that runs in the step, or what it said on disk."""
    config = context.config
    if config.distill.cached:
        folder = context.stage_dir("cache_teacher") if config.distill.cache is None else Path(config.distill.cache)
        return CachedTeacher(folder, teacher_digest=teacher.weights_digest, k=config.distill.top_k,
                             data_digest=prepared_data(context, teacher.path, teacher.arch).digest,
                             seq_length=config.data.seq_length)
    own = config.distill.teacher
    layout = teacher_layout(config.distill, context.layout)
    layout.check(teacher.arch, name="teacher", seq_length=config.data.seq_length)
    return Teacher(
        teacher.arch, teacher.path, context.layout, terms=terms, student_layers=student.arch.num_layers,
        placement=Placement(layout=layout, precision=teacher_precision(config.distill, config.train),
                            offload_weights=own.offload_weights, offload_states=own.offload_states),
        top_k=config.distill.top_k if config.distill.loss == "top_k_kl" else None,
        chunk_tokens=config.train.chunk_tokens, timeout_s=config.parallel.timeout_s)


def _intermediate(context: Context, terms: list[Term], teacher: Checkpoint,
                  student: Checkpoint) -> IntermediateLosses | None:
    distill = context.config.distill
    if not terms:
        return None
    heads = relation_heads(distill, terms, teacher.arch, student.arch, context.layout.tp)
    return IntermediateLosses(terms, alpha=distill.intermediate.alpha, relation_heads=heads)


def _kept_channels(context: Context) -> tuple[int, ...] | None:
    """The teacher's hidden channels that the student was cut from; None of a student from elsewhere."""
    path = context.stage_dir("prune") / "plan.json"
    return Plan.from_dict(read_json(path)).hidden if path.exists() else None


def loss_weights(distill: DistillConfig) -> LossWeights:
    """The recipe's choice as factors of every loss; top-k KL takes the place of KL."""
    chosen = {name: distill.kd_weight if name == distill.loss or (name, distill.loss) == ("kl", "top_k_kl") else 0.0
              for name in ("kl", "reverse_kl", "js", "mse", "cosine")}
    return LossWeights(**chosen, ce=distill.ce_weight, temperature=distill.temperature)
