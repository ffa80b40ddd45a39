"""What a loss hands to the schedule: a sum over tokens, its denominator, and sums for the meters.

Every training step of this project, with or without a teacher, has this interface, so that the
denominator is the global number of valid tokens whatever the micro-batch size, DP, TP and PP
(Megatron's `calculate_per_token_loss` contract).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from nemo_minitron.data.batch import Batch
from nemo_minitron.distill.fused_kl import FusedLoss, fused_linear_loss
from nemo_minitron.distill.losses import CROSS_ENTROPY, LossWeights
from nemo_minitron.distill.top_k import TopK, fused_top_k_loss
from nemo_minitron.model.build import HiddenStateGPT

METERS = (*FusedLoss._fields[:-1], "tokens")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherStates:
    """What the teacher hands over of one micro-batch: hidden states, and the LM head that makes logits of them."""

    hidden: torch.Tensor  # [S*B, Ht], no gradient
    head: torch.Tensor  # [v, Ht], sharded over TP like the student's


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
    weights: LossWeights = CROSS_ENTROPY,
    teacher: TeacherStates | TopK | None = None,
    chunk_tokens: int = 256,
) -> LossTerms:
    """The weighted sum of the logits' losses, on the last pipeline stage.

    Args:
        student: gives the LM head `[v, Hs]` and the unpadded vocabulary size.
        student_hidden: `[S, B, Hs]`, or `[S/tp, B, Hs]` with sequence parallelism.
        batch: labels and loss mask `[B, S]`.
        weights: factor of each loss.
        teacher: hidden states and LM head, or its likeliest tokens; None without a teacher.
        chunk_tokens: tokens worked on at a time.
    """
    head = student.head()
    # Megatron's mixed-precision wrapper hands out float32; the GEMMs are to run in the head's own type
    hidden = tokens_first(student_hidden.to(head.dtype), sequence_parallel=student.config.sequence_parallel)
    common: dict[str, Any] = {"labels": batch.labels.t().reshape(-1), "loss_mask": batch.loss_mask.t().reshape(-1),
                              "weights": weights, "chunk_tokens": chunk_tokens, **vocabulary_shard(student)}
    if isinstance(teacher, TopK):
        fused = fused_top_k_loss(hidden, head, target=teacher, **common)
    else:
        states = (None, None) if teacher is None else (teacher.hidden, teacher.head)
        fused = fused_linear_loss(hidden, head, teacher_hidden=states[0], teacher_head=states[1], **common)
    return LossTerms(
        loss_sum=fused.loss,
        num_tokens=fused.num_tokens.to(torch.int32),
        sums=torch.stack([value.detach().to(torch.float64).reshape(()) for value in fused]),
    )


def vocabulary_shard(model: HiddenStateGPT) -> dict[str, Any]:
    """Which part of the vocabulary this rank's LM head has: `vocab_size`, `vocab_start` and `group` of the losses."""
    return {"vocab_size": model.arch.vocab_size,
            "vocab_start": parallel_state.get_tensor_model_parallel_rank() * model.head().size(0),
            "group": parallel_state.get_tensor_model_parallel_group()}
