"""What a loss hands to the schedule: a sum over tokens, its denominator, and sums for the meters.

Every training step of this project, with or without a teacher, has this interface, so that the
denominator is the global number of valid tokens whatever the micro-batch size, DP, TP and PP
(Megatron's `calculate_per_token_loss` contract).
"""

from __future__ import annotations

import dataclasses

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from nemo_minitron.data.batch import Batch
from nemo_minitron.distill.fused_kl import fused_linear_loss
from nemo_minitron.model.build import HiddenStateGPT

METERS = ("loss", "kl", "ce", "teacher_ce", "agreement", "tokens")
"""Order of `LossTerms.sums`: all are sums over valid tokens, losses in nats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossTerms:
    """One micro-batch's loss on this replica.

    `loss_sum` is a scalar with gradient: nats summed over the valid tokens. `num_tokens` is their number
    (int32 scalar). `sums` is detached, fp64 `[len(METERS)]`.
    """

    loss_sum: torch.Tensor
    num_tokens: torch.Tensor
    sums: torch.Tensor


def tokens_first(hidden_SBH: torch.Tensor, *, sequence_parallel: bool) -> torch.Tensor:
    """Final hidden state `[S, B, H]` -> `[S*B, H]`, ready to be multiplied by a vocabulary shard.

    In backward the partial gradients of all TP ranks are summed, as Megatron's own output layer does:
    with sequence parallelism (`[S/tp, B, H]` in) the forward all-gathers over TP and the backward
    reduce-scatters; without, the forward does nothing and the backward all-reduces.
    """
    if sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=True)
    else:
        hidden_SBH = copy_to_tensor_model_parallel_region(hidden_SBH)
    return hidden_SBH.reshape(-1, hidden_SBH.size(-1))


def loss_terms(
    student: HiddenStateGPT,
    student_hidden: torch.Tensor,
    batch: Batch,
    *,
    teacher_hidden: torch.Tensor | None = None,
    teacher_head: torch.Tensor | None = None,
    kl_weight: float = 0.0,
    ce_weight: float = 1.0,
    chunk_tokens: int = 256,
) -> LossTerms:
    """kl_weight * KL(teacher || student) + ce_weight * CE, on the last pipeline stage.

    Args:
        student: gives the LM head `[v, Hs]` and the unpadded vocabulary size.
        student_hidden: `[S, B, Hs]`, or `[S/tp, B, Hs]` with sequence parallelism.
        batch: labels and loss mask `[B, S]`.
        teacher_hidden: `[S*B, Ht]`, no gradient; None without a teacher.
        teacher_head: `[v, Ht]`, sharded over TP like the student's.
        kl_weight: factor of the divergence.
        ce_weight: factor of the cross-entropy.
        chunk_tokens: tokens worked on at a time.
    """
    head = student.head()
    fused = fused_linear_loss(
        # Megatron's mixed-precision wrapper hands out float32; the GEMMs are to run in the head's own type
        tokens_first(student_hidden.to(head.dtype), sequence_parallel=student.config.sequence_parallel),
        head,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        labels=batch.labels.t().reshape(-1),
        loss_mask=batch.loss_mask.t().reshape(-1),
        vocab_size=student.arch.vocab_size,
        vocab_start=parallel_state.get_tensor_model_parallel_rank() * head.size(0),
        group=parallel_state.get_tensor_model_parallel_group(),
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        chunk_tokens=chunk_tokens,
    )
    sums = (fused.loss.detach(), fused.kl, fused.ce, fused.teacher_ce, fused.agreement, fused.num_tokens)
    return LossTerms(
        loss_sum=fused.loss,
        num_tokens=fused.num_tokens.to(torch.int32),
        sums=torch.stack([value.to(torch.float64).reshape(()) for value in sums]),
    )
