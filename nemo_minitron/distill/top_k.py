"""KL over the teacher's likeliest tokens and one bucket for the rest: from a teacher at hand, or from what was stored.

`teacher_top_k` turns the teacher's hidden states into a `TopK`, k numbers a token instead of V; `fused_top_k_loss` is
the student's half, chunk by chunk like `fused_kl`. `losses.top_k_kl` states the formula (arXiv:2407.14679,
appendix A.5).

Shape letters: T tokens of the micro-batch, C tokens of a chunk, H hidden, v rows of the LM head on this TP rank.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_minitron.distill.fused_kl import NO_TOKEN, FusedLoss, HandOut, Side
from nemo_minitron.distill.losses import LossWeights


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
    """The teacher's k likeliest tokens at each of T tokens, likeliest first, of equal ones the lower id first.

    All ranks of the tensor-parallel group hold the same.
    """

    ids: Tensor  # [T, k] int64, global
    log_probs: Tensor  # [T, k], nats
    log_tail: Tensor  # [T], log of the probability of all other tokens; -inf where there are none
    label_log_probs: Tensor  # [T], of the labels: for the teacher's cross-entropy


def teacher_top_k(hidden: Tensor, head: Tensor, *, k: int, labels: Tensor, loss_mask: Tensor, vocab_size: int,
                  vocab_start: int, group: dist.ProcessGroup | None, chunk_tokens: int = 256) -> TopK:
    """Of each token's distribution over the whole vocabulary, `k` tokens. Four collectives a chunk over `group`.

    Args:
        hidden: [T, Ht], the same on every TP rank.
        head: [v, Ht], this rank's rows, sharded over `group`.
        k: at most `vocab_size`.
        labels: [T] int64 global ids.
        loss_mask: [T]; where it is zero, hidden states are taken for zeros.
        vocab_size: unpadded; rows of global index >= it take no part.
        vocab_start: global index of the first row.
        group: tensor-parallel group.
        chunk_tokens: tokens whose logits exist at a time.
    """
    assert 1 <= k <= vocab_size, (k, vocab_size)
    group = group if group is not None and group.size() > 1 else None
    columns = min(max(vocab_size - vocab_start, 0), len(head))
    side = Side.of(hidden, head, columns, torch.promote_types(hidden.dtype, torch.float32))
    valid = loss_mask != 0
    parts = [_top_k_of_chunk(side, slice(first, first + chunk_tokens), valid, labels, k, vocab_start, group)
             for first in range(0, len(hidden), chunk_tokens)]
    return TopK(**{field.name: torch.cat([getattr(part, field.name) for part in parts])
                   for field in dataclasses.fields(TopK)})


def _top_k_of_chunk(side: Side, rows: slice, valid: Tensor, labels: Tensor, k: int, vocab_start: int,
                    group: dist.ProcessGroup | None) -> TopK:
    inputs = side.inputs(rows, valid)
    logits = inputs.new_empty(len(inputs), len(side.head), dtype=side.compute_dtype)
    side.logits(inputs, logits)
    values, ids = _largest(logits, k)
    ids = ids + vocab_start
    if group is not None:
        gathered = [[torch.empty_like(part) for _ in range(group.size())] for part in (values, ids)]
        for out, part in zip(gathered, (values, ids), strict=True):
            dist.all_gather(out, part.contiguous(), group=group)
        values, ids = (torch.cat(out, 1) for out in gathered)  # in the order of ids, for equal values
    values, order = values.sort(dim=1, descending=True, stable=True)
    values, ids = values[:, :k], ids.gather(1, order)[:, :k]
    label_columns, owned = _columns(labels[rows].unsqueeze(1), vocab_start, logits)
    label_logits = logits.gather(1, label_columns).masked_fill(~owned, -torch.inf) if logits.shape[1] else \
        torch.full_like(values[:, :1], -torch.inf)
    if group is not None:
        dist.all_reduce(label_logits, op=dist.ReduceOp.MAX, group=group)
    exponentials = logits.sub_(values[:, :1]).exp_()  # the largest of all is the first of the top k
    columns, owned = _columns(ids, vocab_start, logits)
    total = exponentials.sum(1)
    if logits.shape[1]:
        _clear(exponentials, columns, owned)
    sums = torch.stack([total, exponentials.sum(1)])
    if group is not None:
        dist.all_reduce(sums, group=group)
    log_normaliser = (sums[0].log() + values[:, 0]).unsqueeze(1)
    return TopK(ids=ids, log_probs=values - log_normaliser, log_tail=(sums[1] / sums[0]).log(),
                label_log_probs=(label_logits - log_normaliser).squeeze(1))


def _largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest [C, k] and their columns, largest first, of equal ones the lower column first.

    Where there are fewer columns, the rest is -inf.
    """
    rows, columns = logits.shape
    kept = min(k, columns)
    values = logits.new_full((rows, k), -torch.inf)
    ids = torch.zeros(rows, k, dtype=torch.int64, device=logits.device)
    if not kept:
        return values, ids
    threshold = logits.topk(kept, dim=1).values[:, -1:]
    above = logits > threshold
    missing = kept - above.sum(1, keepdim=True)
    at = logits == threshold
    chosen = (above | (at & (at.cumsum(1) <= missing))).nonzero()[:, 1].view(rows, kept)
    values[:, :kept], order = logits.gather(1, chosen).sort(dim=1, descending=True, stable=True)
    ids[:, :kept] = chosen.gather(1, order)
    return values, ids


def _columns(ids: Tensor, vocab_start: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Local column of each id (0 where it is not here), and whether it is here."""
    columns = ids - vocab_start
    owned = (columns >= 0) & (columns < logits.shape[1])
    return columns.masked_fill(~owned, 0), owned


def _clear(values: Tensor, columns: Tensor, owned: Tensor) -> None:
    """Set `values` [C, columns] to zero at the owned `columns` [C, k]."""
    here = torch.zeros_like(values, dtype=torch.bool)
    row, place = owned.nonzero(as_tuple=True)
    here[row, columns[row, place]] = True
    values.masked_fill_(here, 0)


def fused_top_k_loss(student_hidden: Tensor, student_head: Tensor, *, target: TopK, labels: Tensor, loss_mask: Tensor,
                     vocab_size: int, vocab_start: int, group: dist.ProcessGroup | None, weights: LossWeights,
                     chunk_tokens: int = 256) -> FusedLoss:
    """Sum over valid tokens of `weights.kl` times the top-k KL and `weights.ce` times cross-entropy, in nats.

    Arguments as in `fused_kl.fused_linear_loss`, with `target` in the teacher's place; `weights` may have no other
    loss, and temperature 1. Two all-reduces a chunk and one a micro-batch. `kl` of the result is the top-k KL.
    """
    assert weights.kl_and_ce_only and weights.temperature == 1.0
    columns = min(max(vocab_size - vocab_start, 0), len(student_head))
    side = Side.of(student_hidden.detach(), student_head.detach(), columns,
                   torch.promote_types(student_hidden.dtype, torch.float32))
    wants_grad = torch.is_grad_enabled() and (student_hidden.requires_grad or student_head.requires_grad)
    chunks = _Chunks(side=side, target=target, labels=labels, valid=loss_mask != 0, vocab_start=vocab_start,
                     group=group if group is not None and group.size() > 1 else None, weights=weights,
                     chunk_tokens=chunk_tokens, head_rows=len(student_head), wants_grad=wants_grad)
    return FusedLoss(*HandOut.apply(student_hidden, student_head, chunks))


@dataclasses.dataclass
class _Chunks:
    """The loop over chunks of tokens of the student's half."""

    side: Side
    target: TopK
    labels: Tensor
    valid: Tensor
    vocab_start: int
    group: dist.ProcessGroup | None
    weights: LossWeights
    chunk_tokens: int
    head_rows: int
    wants_grad: bool

    def run(self) -> tuple[FusedLoss, Tensor | None, Tensor | None]:
        """The loss and, where wanted, its gradients by the hidden states [T, Hs] (partial) and the head [v, Hs]."""
        side, num_tokens = self.side, len(self.valid)
        dtype, device = side.compute_dtype, side.hidden.device
        buffer = torch.empty(min(self.chunk_tokens, num_tokens), len(side.head), dtype=dtype, device=device)
        kl, ce = torch.zeros(2, num_tokens, dtype=dtype, device=device)
        argmax = torch.empty(num_tokens, dtype=torch.int64, device=device)
        grad_hidden, grad_head = side.grad_buffers(self.head_rows) if self.wants_grad else (None, None)
        for start in range(0, num_tokens, self.chunk_tokens):
            rows = slice(start, min(start + self.chunk_tokens, num_tokens))
            inputs = side.inputs(rows, self.valid)
            logits = side.logits(inputs, buffer[: rows.stop - rows.start])
            kl[rows], ce[rows], argmax[rows] = self._chunk(logits, rows)
            if grad_hidden is not None and grad_head is not None:
                side.add_grads(logits, inputs, grad_hidden[rows], grad_head[: len(side.head)])
        if self.group is not None:
            dist.all_reduce(argmax, op=dist.ReduceOp.MIN, group=self.group)
        agreement = ((argmax == self.target.ids[:, 0]) & self.valid).sum().to(dtype)
        total_kl, total_ce, zero = kl.sum(), ce.sum(), kl.new_zeros(())
        loss = self.weights.total({"kl": total_kl, "ce": total_ce})
        teacher_ce = -self.target.label_log_probs.to(dtype)[self.valid].sum()
        result = FusedLoss(loss=loss, kl=total_kl, reverse_kl=zero, js=zero.clone(), mse=zero.clone(),
                           cosine=zero.clone(), ce=total_ce, teacher_ce=teacher_ce, agreement=agreement,
                           num_tokens=self.valid.sum().to(dtype))
        return result, grad_hidden, grad_head

    def _chunk(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """KL and cross-entropy per token [C], and the argmax held here; overwrites logits with the gradient."""
        valid, columns = self.valid[rows], logits.shape[1]
        wanted = torch.cat([self.target.ids[rows], self.labels[rows].unsqueeze(1)], 1)
        places, owned = _columns(wanted, self.vocab_start, logits)
        stats = logits.new_full((len(logits), wanted.shape[1] + 1), -torch.inf)
        held = torch.zeros_like(valid, dtype=torch.int64)
        if columns:
            stats[:, 0], held = logits.max(dim=1)
            stats[:, 1:] = logits.gather(1, places).masked_fill(~owned, -torch.inf)
        local_maxima = stats[:, 0].clone()
        self._reduce(stats, dist.ReduceOp.MAX)
        maxima, top_logits, label_logits = stats[:, :1], stats[:, 1:-1] - stats[:, :1], stats[:, -1] - stats[:, 0]
        argmax = torch.where(local_maxima == stats[:, 0], held + self.vocab_start, NO_TOKEN)
        exponentials = logits.sub_(maxima).exp_()
        in_top = torch.zeros_like(logits, dtype=torch.bool)
        row, place = owned[:, :-1].nonzero(as_tuple=True)
        in_top[row, places[row, place]] = True
        sums = torch.stack([exponentials.sum(1), exponentials.masked_fill(in_top, 0).sum(1)])
        self._reduce(sums, dist.ReduceOp.SUM)
        log_normaliser = sums[0].log()
        kl, by_top, tail_scale = self._divergence(top_logits - log_normaliser.unsqueeze(1), sums, rows)
        ce = torch.where(valid, log_normaliser - label_logits, 0)
        probs = exponentials.mul_((valid / sums[0]).unsqueeze(1))
        kl_weight, ce_weight = self.weights.kl, self.weights.ce
        in_tail = ~in_top
        probs.mul_((in_tail * tail_scale.unsqueeze(1)).mul_(kl_weight).add_(ce_weight))
        probs[row, places[row, place]] += kl_weight * by_top[row, place] * valid[row]
        if ce_weight and columns:
            probs.scatter_add_(1, places[:, -1:], (owned[:, -1:] & valid.unsqueeze(1)).to(probs.dtype) * -ce_weight)
        return torch.where(valid, kl, 0), ce, argmax

    def _divergence(self, top_log_probs: Tensor, sums: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """KL [C], its derivative by the top logits [C, k], and that by the tail's logits over their p_s [C].

        The student's buckets, the k tokens [C, k] and the tail, against the teacher's. With one tail bucket of
        probability P: d/dz = p_s - p_t for a top token and p_s * (1 - P_t / P_s) for one of the tail.
        """
        dtype = sums.dtype
        teacher = torch.cat([self.target.log_probs[rows], self.target.log_tail[rows].unsqueeze(1)], 1).to(dtype)
        student = torch.cat([top_log_probs, (sums[1] / sums[0]).log().unsqueeze(1)], 1)
        empty = torch.isneginf(teacher) & torch.isneginf(student)
        ratio = torch.where(empty, 0, student - teacher)
        student_probs, teacher_probs = student.exp(), teacher.exp()
        cross = torch.where(teacher_probs > 0, teacher_probs * ratio, 0)
        kl = ((student_probs + teacher_probs) * torch.tanh(ratio / 2) - cross).sum(1).clamp_min(0)
        tail_scale = torch.where(student_probs[:, -1] > 0, -torch.expm1(-ratio[:, -1]), 0)
        return kl, (student_probs - teacher_probs)[:, :-1], tail_scale

    def _reduce(self, tensor: Tensor, op: object) -> None:
        if self.group is not None:
            dist.all_reduce(tensor, op=op, group=self.group)
