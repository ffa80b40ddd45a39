"""The custom NeMo training step of distillation: the teacher streams in the same step as the student."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from nemo_minitron.arch import ArchSpec
from nemo_minitron.data.batch import Batch, Samples
from nemo_minitron.distill.divergences import TERMS
from nemo_minitron.distill.intermediate import IntermediateLosses
from nemo_minitron.distill.losses import LossWeights
from nemo_minitron.distill.teacher import HandedOver, TeacherSource
from nemo_minitron.distill.terms import METERS, LossTerms, loss_terms
from nemo_minitron.evaluate.loss import heldout_sums
from nemo_minitron.training.module import TrainingModule, means_of
from nemo_minitron.training.throughput import flops_per_token


class DistillationModule(TrainingModule):
    """Trains the student on the teacher's logits, and where asked on its text and on the teacher's intermediate states.

    Source: arXiv:2407.14679, section 3; forward KL on the logits alone is its best practice 5.
    """

    def __init__(self, *, teacher: TeacherSource, teacher_arch: ArchSpec, weights: LossWeights,
                 intermediate: IntermediateLosses | None = None, kept_channels: Sequence[int] | None = None,
                 **student: Any) -> None:
        """`teacher` stays outside of the module tree: not trained, not wrapped, not saved."""
        super().__init__(**student, unfused_norms=intermediate is not None)
        self.teacher, self.teacher_arch, self.weights = teacher, teacher_arch, weights
        self.intermediate, self.kept_channels = intermediate, kept_channels

    def training_step(self, batch: Batch, batch_idx: int | None = None) -> LossTerms:
        """One micro-batch on the last stage: teacher, student, and the loss from both hidden states and LM heads."""
        student_hidden = self.forward_step(batch)
        return self.loss(student_hidden, batch)

    def forward_step(self, batch: Batch) -> torch.Tensor:
        """One micro-batch on any stage; intermediate losses join where their layer is."""
        with self.beside_teacher(batch):
            return super().forward_step(batch)

    def beside_teacher(self, batch: Batch) -> Any:
        """Take what the teacher has for `batch`; the student's forward pass inside is compared with its states."""
        self._handed_over: HandedOver = self.teacher.hand_over(batch)
        if self.intermediate is None:
            return nullcontext()
        return self.intermediate.comparing(self._handed_over.states, batch)

    def loss(self, student_hidden: torch.Tensor, batch: Batch) -> LossTerms:
        """The logits' loss, of the micro-batch that `beside_teacher` saw last."""
        return loss_terms(self.student, student_hidden, batch, weights=self.weights, teacher=self._handed_over.logits,
                          chunk_tokens=self.chunk_tokens)

    def measure(self, samples: Samples, *, micro_batch_size: int, max_samples: int | None = None) -> dict[str, float]:
        """Means on held-out data of the divergence, both cross-entropies, agreement and each intermediate term.

        Of the cross-entropy alone where the teacher is on disk, which has no held-out text.
        """
        if not self.teacher.knows_any_text:
            return super().measure(samples, micro_batch_size=micro_batch_size, max_samples=max_samples)
        sums = heldout_sums(
            self.student, samples, layout=self.layout, micro_batch_size=micro_batch_size, max_samples=max_samples,
            sums_of=lambda hidden, batch: self.loss(hidden, batch).sums, prepare=self.teacher.prepare,
            around=self.beside_teacher)
        means = means_of(sums, tuple(name for name in self.meters if name != "loss"))
        return means if self.intermediate is None else means | self.intermediate.take_means(float(sums[-1]))

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Build the student, with the projection of the intermediate losses if widths differ."""
        is_new = not hasattr(self, "module")
        super().configure_model(vp_stage)
        if is_new and self.intermediate is not None:
            self.intermediate.attach_to(self.student, teacher_size=self.teacher_arch.hidden_size,
                                        kept=self.kept_channels)

    @property
    def meters(self) -> tuple[str, ...]:
        """Losses of both models and how often they agree; of other divergences than KL those that have a weight."""
        return tuple(name for name in METERS if name == "kl" or name not in TERMS or getattr(self.weights, name))

    def finish_step(self, means: dict[str, float]) -> dict[str, float]:
        """Add the intermediate terms; `loss` is then the sum that was trained on, and `logits_loss` its first part."""
        if self.intermediate is None:
            return means
        own = self.intermediate.step_means(means["loss"], means["tokens"])
        return means | own | {"logits_loss": means["loss"], "loss": means["loss"] + own["alpha"] * own["intermediate"]}

    def before_step(self, batches: list[Batch]) -> None:
        """Where the teacher runs ahead: its own forward-only pass over the step's micro-batches."""
        self.teacher.prepare(batches)

    @property
    def needs_batches(self) -> bool:
        """Whether the teacher must run before the student's schedule."""
        return self.teacher.runs_ahead

    def flops_per_token(self) -> float:
        """With the teacher's forward pass, where there is one."""
        teacher = self.teacher_arch if self.teacher.knows_any_text else None
        return flops_per_token(self.arch, teacher, self.seq_length)

    def take_teacher_seconds(self) -> float:
        """Seconds of this rank in the teacher's forward pass, or reading what it said."""
        return self.teacher.stopwatch.take()

    def sum_gradients(self) -> None:
        """The projection has a copy on every pipeline stage."""
        if self.intermediate is not None:
            self.intermediate.sum_gradients()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the weight of the intermediate losses for resuming."""
        checkpoint["distillation"] = {"alpha": None if self.intermediate is None else self.intermediate.alpha}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """And take it back."""
        if self.intermediate is not None:
            self.intermediate.alpha = checkpoint["distillation"]["alpha"]
