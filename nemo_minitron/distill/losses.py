"""The distillation losses as plain formulas on full logits: the definitions, and the reference of the tests.

Slow on purpose: several `[T, V]` tensors, one device, autograd for the gradient. Training uses `fused_kl`, which
computes the same numbers from hidden states. Source: arXiv:2407.14679, section 3 (retraining with distillation).

Shape letters: T tokens of a micro-batch, V vocabulary (unpadded). All values are in nats. All functions return sums
over valid tokens (`loss_mask` not zero), so the caller owns the denominator; a row that is not valid contributes
exactly zero, whatever it contains, and no valid row at all gives zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
