"""The custom NeMo training step of distillation: the teacher streams in the same step as the student."""

from __future__ import annotations

from typing import Any

from nemo_minitron.data.batch import Batch
from nemo_minitron.distill.teacher import Teacher
from nemo_minitron.distill.terms import METERS, LossTerms, loss_terms
from nemo_minitron.training.module import TrainingModule


class DistillationModule(TrainingModule):
    """Trains the student on KL(teacher || student), with cross-entropy mixed in by a fixed weight if asked.

    Source: arXiv:2407.14679, section 3; forward KL on the logits alone is its best practice 5.
    """

    def __init__(self, *, teacher: Teacher, kl_weight: float, ce_weight: float, **student: Any) -> None:
        """`teacher` stays outside of the module tree: not trained, not wrapped, not saved."""
        super().__init__(**student)
        self.teacher = teacher
        self.kl_weight = kl_weight
        self.ce_weight = ce_weight

    def training_step(self, batch: Batch, batch_idx: int | None = None) -> LossTerms:
        """Student forward, teacher forward, and the loss from both hidden states and LM heads."""
        student_hidden = self.forward_step(batch)
        teacher_hidden = self.teacher.states(batch)
        return loss_terms(
            self.student, student_hidden, batch,
            teacher_hidden=teacher_hidden, teacher_head=self.teacher.head,
            kl_weight=self.kl_weight, ce_weight=self.ce_weight, chunk_tokens=self.chunk_tokens,
        )

    @property
    def meters(self) -> tuple[str, ...]:
        """All of them: losses of both models and how often they agree."""
        return METERS

    def before_step(self, batches: list[Batch]) -> None:
        """With several pipeline stages: the teacher's own forward-only pass over the step's micro-batches."""
        self.teacher.prepare(batches)

    @property
    def needs_batches(self) -> bool:
        """Only a teacher that is itself a pipeline must run before the student's schedule."""
        return self.teacher.layout.pp > 1
