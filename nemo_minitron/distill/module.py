"""The custom NeMo training step of distillation: the teacher streams in the same step as the student."""

from __future__ import annotations

from typing import Any

from nemo_minitron.data.batch import Batch
from nemo_minitron.distill.cache import CachedTeacher
from nemo_minitron.distill.divergences import TERMS
from nemo_minitron.distill.losses import LossWeights
from nemo_minitron.distill.teacher import Teacher
from nemo_minitron.distill.terms import METERS, LossTerms, loss_terms
from nemo_minitron.training.module import TrainingModule


class DistillationModule(TrainingModule):
    """Trains the student on the teacher's logits, with cross-entropy mixed in by a fixed weight if asked.

    Source: arXiv:2407.14679, section 3; forward KL on the logits alone is its best practice 5.
    """

    def __init__(self, *, teacher: Teacher | CachedTeacher, weights: LossWeights, **student: Any) -> None:
        """`teacher` stays outside of the module tree: not trained, not wrapped, not saved."""
        super().__init__(**student)
        self.teacher = teacher
        self.weights = weights

    def training_step(self, batch: Batch, batch_idx: int | None = None) -> LossTerms:
        """Student forward, teacher forward, and the loss from both hidden states and LM heads."""
        student_hidden = self.forward_step(batch)
        return loss_terms(self.student, student_hidden, batch, weights=self.weights, teacher=self.teacher.states(batch),
                          chunk_tokens=self.chunk_tokens)

    @property
    def meters(self) -> tuple[str, ...]:
        """Losses of both models and how often they agree; of other divergences than KL those that have a weight."""
        return tuple(name for name in METERS if name == "kl" or name not in TERMS or getattr(self.weights, name))

    def before_step(self, batches: list[Batch]) -> None:
        """With several pipeline stages: the teacher's own forward-only pass over the step's micro-batches."""
        self.teacher.prepare(batches)

    @property
    def needs_batches(self) -> bool:
        """Only a teacher that is itself a pipeline must run before the student's schedule."""
        return self.teacher.runs_ahead
