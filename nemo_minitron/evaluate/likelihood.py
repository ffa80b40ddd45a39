"""Log-likelihood of chosen tokens under a live model, on its last stage, over a vocabulary that TP ranks share.

Shape letters: S sequence, B micro-batch, H hidden, N chosen tokens, v local vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from nemo_minitron.data.batch import Batch
from nemo_minitron.distill.terms import tokens_first, vocabulary_shard
from nemo_minitron.model.build import HiddenStateGPT


class TokenScores(NamedTuple):
    """Of each chosen token: its log-probability in nats, fp64 `[N]`, and whether it is the likeliest, bool `[N]`."""

    log_probs: torch.Tensor
    greedy: torch.Tensor


def token_scores(model: HiddenStateGPT, hidden: torch.Tensor, rows: torch.Tensor, places: torch.Tensor,
                 labels: torch.Tensor, *, chunk_tokens: int = 256) -> TokenScores:
    """Score `labels` as the tokens that follow position `places` of row `rows`.

    Only the chosen positions meet the LM head, `chunk_tokens` at a time. Four all-reduces a chunk over TP (maximum,
    lowest index that has it, sum of exponentials, the label's logit), after one all-gather with sequence parallelism.
    Every TP rank of the last stage must call this with the same tokens, and each gets the result.

    Args:
        model: this rank's shard.
        hidden: the final hidden state `[S, B, H]` (`[S/tp, B, H]` with sequence parallelism).
        rows, places, labels: int64 `[N]`; a position may be chosen more than once.
        chunk_tokens: tokens whose logits exist at a time.
    """
    head_vH = model.head()
    flat_TH = tokens_first(hidden.to(head_vH.dtype), sequence_parallel=model.config.sequence_parallel)
    chosen_NH = flat_TH[places * hidden.size(1) + rows]
    parts = [_chunk_scores(model, chosen_NH[start : start + chunk_tokens], head_vH,
                           labels[start : start + chunk_tokens]) for start in range(0, len(labels), chunk_tokens)]
    if not parts:
        return TokenScores(torch.zeros(0, dtype=torch.float64, device=hidden.device),
                           torch.zeros(0, dtype=torch.bool, device=hidden.device))
    return TokenScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _chunk_scores(model: HiddenStateGPT, chosen_NH: torch.Tensor, head_vH: torch.Tensor,
                  labels: torch.Tensor) -> TokenScores:
    shard = vocabulary_shard(model)
    start, group = shard["vocab_start"], shard["group"]
    valid = max(0, min(head_vH.size(0), shard["vocab_size"] - start))  # the last rank's rows may be padding
    logits_Nv = (chosen_NH @ head_vH.t()).float()
    logits_Nv[:, valid:] = -torch.inf
    local_max, local_index = logits_Nv.max(-1)
    maximum = local_max.clone()
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    first = torch.where(local_max == maximum, local_index + start, torch.iinfo(torch.int64).max)
    dist.all_reduce(first, op=dist.ReduceOp.MIN, group=group)
    total = (logits_Nv - maximum[:, None]).double().exp().sum(-1)
    dist.all_reduce(total, group=group)
    here = (labels >= start) & (labels < start + valid)
    of_label = logits_Nv.gather(-1, (labels - start).clamp(0, head_vH.size(0) - 1)[:, None])[:, 0]
    of_label = torch.where(here, of_label, 0.0).double()
    dist.all_reduce(of_label, group=group)
    return TokenScores(of_label - maximum.double() - total.log(), first == labels)


def row_nats(model: HiddenStateGPT, hidden: torch.Tensor, batch: Batch, *, chunk_tokens: int = 256) -> torch.Tensor:
    """Minus the log-likelihood of each row's unmasked tokens, nats, summed over them: fp64 `[B]`.

    `hidden` is the final hidden state `[S, B, H]` (`[S/tp, B, H]` with sequence parallelism); every TP rank of the last
    stage must call this, and each gets the result.
    """
    rows, places = batch.loss_mask.nonzero(as_tuple=True)
    scores = token_scores(model, hidden, rows, places, batch.labels[rows, places], chunk_tokens=chunk_tokens)
    return torch.zeros(hidden.size(1), dtype=torch.float64, device=hidden.device).index_add_(0, rows, -scores.log_probs)
