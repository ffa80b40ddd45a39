"""The distillation losses as plain formulas on full logits: the definitions, and the reference of the tests.

Slow on purpose: several `[T, V]` tensors, one device, autograd for the gradient. Training uses `fused_kl`, which
computes the same numbers from hidden states. Source: arXiv:2407.14679, section 3 (retraining with distillation).

Shape letters: T tokens of a micro-batch, V vocabulary (unpadded). All values are in nats. All functions return sums
over valid tokens (`loss_mask` not zero), so the caller owns the denominator; a row that is not valid contributes
exactly zero, whatever it contains, and no valid row at all gives zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Factor of each loss of the logits in their sum; those of zero are not computed (KL is, as a meter).

    `temperature` divides the logits of the divergences (kl, reverse_kl, js), and their value is multiplied by its
    square, which keeps the size of their gradient (arXiv:1503.02531, section 2; the official Megatron code leaves the
    factor out). Meters show the divergence itself. Cross-entropy, mse and cosine know no temperature.
    """

    kl: float = 1.0
    reverse_kl: float = 0.0
    js: float = 0.0
    mse: float = 0.0
    cosine: float = 0.0
    ce: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what no loss can have; the recipe's own check names the key."""
        assert self.temperature > 0 and math.isfinite(self.temperature), self.temperature

    @property
    def kl_and_ce_only(self) -> bool:
        """Whether nothing but forward KL and cross-entropy has a weight."""
        return not (self.reverse_kl or self.js or self.mse or self.cosine)

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of `terms` (scalars, by field name); an infinite one of no weight does not make it NaN."""
        loss = torch.zeros_like(terms["ce"])
        for name, value in terms.items():
            weight = getattr(self, name)
            if weight:
                squared = self.temperature**2 if name in ("kl", "reverse_kl", "js") else 1.0
                loss = loss + weight * squared * value
        return loss


CROSS_ENTROPY = LossWeights(kl=0.0, ce=1.0)
"""Plain language modelling, without a teacher."""


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, loss_mask: Tensor) -> Tensor:
    """Sum over valid tokens of KL(p_t || p_s) = sum_v p_t(v) * (log p_t(v) - log p_s(v)), at temperature 1.

    This is the logit loss `L_logits` of arXiv:2407.14679, section 3, with Loss = KL divergence and without its
    denominator (the sequence length).

    Args:
        student_logits: [T, V], global; may require grad.
        teacher_logits: [T, V], global; treated as a constant.
        loss_mask: [T]; a token counts where this is not zero.

    Returns:
        Scalar, float32 or float64 (the wider of float32 and the logits' dtype), nats.
    """
    valid = loss_mask != 0
    student_log_probs = _log_probs(student_logits[valid])
    teacher_log_probs = _log_probs(teacher_logits[valid].detach())
    return (teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)).sum()


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, loss_mask: Tensor) -> Tensor:
    """Sum over valid tokens of KL(p_s || p_t), at temperature 1 (R-KLD of arXiv:2407.14679, section 3).

    Arguments and result as in `forward_kl`; here too only the student's logits have a gradient.
    """
    valid = loss_mask != 0
    student_log_probs = _log_probs(student_logits[valid])
    teacher_log_probs = _log_probs(teacher_logits[valid].detach())
    return (student_log_probs.exp() * (student_log_probs - teacher_log_probs)).sum()


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, loss_mask: Tensor) -> Tensor:
    """Sum over valid tokens of (KL(p_t || m) + KL(p_s || m)) / 2 with m = (p_s + p_t) / 2, at temperature 1.

    Arguments and result as in `forward_kl`. At most log 2 a token. Not in the paper; [common choice].
    """
    valid = loss_mask != 0
    student_log_probs = _log_probs(student_logits[valid])
    teacher_log_probs = _log_probs(teacher_logits[valid].detach())
    middle = torch.logaddexp(student_log_probs, teacher_log_probs) - math.log(2)
    of_teacher = teacher_log_probs.exp() * (teacher_log_probs - middle)
    of_student = student_log_probs.exp() * (student_log_probs - middle)
    return (of_teacher + of_student).sum() / 2


def mean_squared_error(student_logits: Tensor, teacher_logits: Tensor, loss_mask: Tensor) -> Tensor:
    """Sum over valid tokens of the mean over the vocabulary of (z_s - z_t)^2, on raw logits.

    Arguments and result as in `forward_kl`, no unit. The MSE of arXiv:2407.14679, Table 15 ("logits(MSE)").
    """
    valid = loss_mask != 0
    return (_wide(student_logits[valid]) - _wide(teacher_logits[valid].detach())).square().mean(1).sum()


def cosine_distance(student_logits: Tensor, teacher_logits: Tensor, loss_mask: Tensor) -> Tensor:
    """Sum over valid tokens of 1 - cos(z_s, z_t), on raw logits.

    Arguments and result as in `forward_kl`, no unit. The cosine of arXiv:2407.14679, Table 15 ("logits(cosine)").
    """
    valid = loss_mask != 0
    student, teacher = _wide(student_logits[valid]), _wide(teacher_logits[valid].detach())
    return (1 - torch.nn.functional.cosine_similarity(student, teacher, dim=1, eps=0.0)).sum()


def top_k_kl(student_logits: Tensor, teacher_logits: Tensor, loss_mask: Tensor, k: int) -> Tensor:
    """Sum over valid tokens of KL(teacher || student) over the teacher's k likeliest tokens and one for all the rest.

    Of equal logits the lower id is taken. Merging outcomes never raises a KL, so this is at most `forward_kl`, and
    equal to it for k >= V - 1. Arguments and result as in `forward_kl`. arXiv:2407.14679, appendix A.5 ("top-K").
    """
    valid = loss_mask != 0
    student_log_probs = _log_probs(student_logits[valid])
    teacher_log_probs = _log_probs(teacher_logits[valid].detach())
    order = teacher_log_probs.argsort(dim=1, descending=True, stable=True)
    merged = []
    for log_probs in (student_log_probs, teacher_log_probs):
        in_order = log_probs.gather(1, order)
        rest = in_order[:, k:]
        parts = [in_order[:, :k]] if not rest.shape[1] else [in_order[:, :k], rest.logsumexp(1, keepdim=True)]
        merged.append(torch.cat(parts, 1))
    student, teacher = merged
    return (teacher.exp() * (teacher - student)).sum()


def cross_entropy(logits: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
    """Sum over valid tokens of -log p(label): the `L_CE` of arXiv:2407.14679, section 3, without its denominator.

    Args:
        logits: [T, V], global; may require grad.
        labels: [T] int64 vocabulary ids; those of tokens that do not count may be anything.
        loss_mask: [T]; a token counts where this is not zero.

    Returns:
        Scalar, float32 or float64 (the wider of float32 and the logits' dtype), nats.
    """
    valid = loss_mask != 0
    return -_log_probs(logits[valid]).gather(1, labels[valid].unsqueeze(1)).sum()


def _log_probs(logits: Tensor) -> Tensor:
    return torch.log_softmax(_wide(logits), dim=-1)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
