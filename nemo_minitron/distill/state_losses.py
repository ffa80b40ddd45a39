"""The losses of intermediate states, as plain formulas with autograd: used in training as they are.

arXiv:2407.14679, section 3 (`L_is`) and appendix A.6. Shape letters: S sequence, B micro-batch, H hidden, C channels
of all local heads, R relation heads. All functions return a sum over valid tokens, so the caller owns the denominator;
what is at a token that is not valid has no part in it, not even a NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine_of_states(student_SBH: Tensor, teacher_SBH: Tensor, valid_SB: Tensor) -> Tensor:
    """Sum over valid tokens of 1 - cos(h_s, h_t).

    Args:
        student_SBH: [S, B, H], projected to the teacher's width where the widths differ; may require grad.
        teacher_SBH: [S, B, H], a constant.
        valid_SB: [S, B] bool.

    Returns:
        Scalar of float32 or wider, between 0 and twice the number of valid tokens.
    """
    student, teacher = _only_valid(student_SBH, teacher_SBH, valid_SB)
    return ((1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)) * valid_SB).sum()


def mse_of_states(student_SBH: Tensor, teacher_SBH: Tensor, valid_SB: Tensor) -> Tensor:
    """Sum over valid tokens of the mean over channels of (h_s - h_t)^2. Arguments as in `cosine_of_states`."""
    student, teacher = _only_valid(student_SBH, teacher_SBH, valid_SB)
    return ((student - teacher).square().mean(-1) * valid_SB).sum()


def relation_kl(student_SBC: Tensor, teacher_SBC: Tensor, valid_SB: Tensor, *, relation_heads: int,
                document_ids_BS: Tensor | None = None) -> Tensor:
    """Sum over valid tokens of KL(teacher || student) of how a token relates to those before it and itself, nats.

    The relation of a token in one relation head is softmax(A A^T / sqrt(d)) over the tokens up to it, with A the
    queries (or keys, or values) of all heads side by side, cut anew into relation heads of d channels: the numbers of
    heads of both models may differ. Summed over the relation heads here. MiniLMv2 (arXiv:2012.15828, section 3.1),
    whose encoders relate every token to all; a causal model's relations stop at the token itself.

    Args:
        student_SBC: [S, B, C], C of the student; may require grad.
        teacher_SBC: [S, B, C'], C' of the teacher; a constant.
        valid_SB: [S, B] bool.
        relation_heads: how many there are among these channels; a divisor of C and of C'.
        document_ids_BS: [B, S] as in `Batch`: a token relates to those of its own document only; None: one each row.
    """
    sequence = student_SBC.shape[0]
    seen = torch.ones(sequence, sequence, dtype=torch.bool, device=student_SBC.device).tril()
    if document_ids_BS is not None:
        seen = (seen & (document_ids_BS.unsqueeze(2) == document_ids_BS.unsqueeze(1))).unsqueeze(1)  # [B, 1, S, S]
    log_probs = []
    for states in (student_SBC, teacher_SBC.detach()):
        batch, channels = states.shape[1:]
        heads = states.to(_wide(states)).reshape(sequence, batch, relation_heads, -1).permute(1, 2, 0, 3)
        scores_BRSS = heads @ heads.transpose(-1, -2) / math.sqrt(channels // relation_heads)
        log_probs.append(torch.log_softmax(scores_BRSS.masked_fill(~seen, -torch.inf), -1).masked_fill(~seen, 0.0))
    student, teacher = log_probs
    kl_BRS = (teacher.exp() * (teacher - student)).sum(-1)  # both are 0 where a token is not seen
    valid = valid_SB.t().unsqueeze(1)
    return torch.where(valid, kl_BRS, 0.0).sum()


def _only_valid(student: Tensor, teacher: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or wider, with ones at tokens that do not count: zeros and NaNs have no clean gradient."""
    mask = valid.unsqueeze(-1)
    student, teacher = student.to(_wide(student)), teacher.detach().to(_wide(student))
    return torch.where(mask, student, 1.0), torch.where(mask, teacher, 1.0)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
