"""Distillation losses of LM heads over a sharded vocabulary, without a `[tokens, vocab]` tensor.

The losses of arXiv:2407.14679, section 3 (`losses.py` states the formulas), computed from final hidden states: each
chunk of tokens is multiplied with this rank's rows of both LM heads, and the values and the gradient with respect to
the student's logits are formed while the chunk's logits are at hand (`divergences`). It knows nothing of Megatron, and
does not reduce the gradient of the hidden states over tensor parallel: that is for the mapping around it.

Shape letters: T tokens of the micro-batch, C tokens of a chunk, H hidden, v rows of the LM head on this TP rank.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_minitron.distill.divergences import TERMS, Block, forward_kl_block, general_block, js_student_part
from nemo_minitron.distill.losses import LossWeights

# GEMMs that read bfloat16 and return float32 came with torch 2.8, for CUDA only.
_MIXED_GEMM = hasattr(torch.ops.aten.mm, "dtype_out")
NO_TOKEN = torch.iinfo(torch.int64).max
"""Stands for the id of a maximum that another rank holds."""
# Elementwise work takes some rows of a chunk at a time: its scratch is this large, or a quarter of a chunk if less. On
# CPU it stays in the cache.
_SCRATCH_BYTES = {"cpu": 2**21, "cuda": 2**26}


class FusedLoss(NamedTuple):
    """Sums over the valid tokens of a micro-batch, the same on every TP rank; the caller owns the denominator.

    All are scalars, float64 for float64 hidden states and float32 otherwise. Only `loss` carries a gradient.
    """

    loss: Tensor  # the weighted sum of the terms; divergences times temperature^2
    kl: Tensor  # KL(teacher || student) at the temperature, nats; 0 without a teacher
    reverse_kl: Tensor  # KL(student || teacher), nats; this and the next three are 0 where their weight is
    js: Tensor  # Jensen-Shannon divergence, nats
    mse: Tensor  # mean over the vocabulary of the squared difference of logits
    cosine: Tensor  # 1 - cosine of the logits
    ce: Tensor  # cross-entropy of the student, nats
    teacher_ce: Tensor  # cross-entropy of the teacher, nats; 0 without a teacher
    agreement: Tensor  # tokens where both have the same argmax (the lowest id of equal logits); 0 without a teacher
    num_tokens: Tensor  # valid tokens


def fused_linear_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    *,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor,
    vocab_size: int,
    vocab_start: int,
    group: dist.ProcessGroup | None,
    weights: LossWeights,
    chunk_tokens: int = 256,
) -> FusedLoss:
    """Sum over valid tokens of the weighted losses, in nats.

    Every rank of `group` must call this with the same tokens. Collectives over it, none where it is None or of size 1:
    two all-reduces a chunk (max, sum of a few numbers per token), three for Jensen-Shannon, and with a teacher two a
    micro-batch.

    Logits, gradients and sums are in float32 (float64 for float64 hidden states), also for bfloat16 inputs: on CUDA
    their GEMMs read bfloat16 (so the gradient of the logits is rounded to it) and return float32; elsewhere, and with
    torch < 2.8, both heads are converted once a call.
    Memory beyond inputs and gradients for forward KL and cross-entropy at temperature 1 is 2.25 chunks of logits
    [C, v] or less (1.25 without a teacher; half a chunk more where bfloat16 GEMMs are used), for other losses about 4.
    With `chunk_tokens` = 256, the CPU optimum measured at v = 32768, H = 512 and 1024; a GPU wants 1024 and more.

    Args:
        student_hidden: [T, Hs], all tokens (already gathered over sequence parallel), the same on every TP rank. Its
            gradient is this rank's partial contribution: summed over TP by the caller's mapping.
        student_head: [v, Hs], this rank's rows of the LM head, sharded over `group`. Its gradient is complete, and
            zero on padding rows.
        teacher_hidden: [T, Ht] like `student_hidden`, a constant; None for plain cross-entropy.
        teacher_head: [v, Ht], sharded like `student_head`, a constant; None exactly where `teacher_hidden` is.
        labels: [T] int64 global ids. An id >= `vocab_size` on a valid token makes the cross-entropy infinite.
        loss_mask: [T]; a token is valid where this is not zero. Others contribute exactly zero to values and
            gradients, whatever their hidden states and labels hold.
        vocab_size: unpadded global size V; rows of global index >= V are padding and take no part.
        vocab_start: global index of this shard's first row.
        group: tensor-parallel group.
        weights: factor of each loss, and the temperature; those that need a teacher are ignored without one.
        chunk_tokens: tokens whose logits exist at a time.

    Returns:
        The sums. Gradients are computed here, where grad mode is on and the student needs them; `backward` only scales
        them, and a second one through the same graph raises RuntimeError.
    """
    assert (teacher_hidden is None) == (teacher_head is None)
    assert len(student_hidden) == len(labels) == len(loss_mask) and chunk_tokens > 0
    compute_dtype = torch.promote_types(student_hidden.dtype, torch.float32)
    num_columns = min(max(vocab_size - vocab_start, 0), len(student_head))
    student = Side.of(student_hidden.detach(), student_head.detach(), num_columns, compute_dtype)
    teacher = None
    if teacher_hidden is not None and teacher_head is not None:
        assert len(teacher_hidden) == len(student_hidden) and len(teacher_head) == len(student_head)
        teacher = Side.of(teacher_hidden.detach(), teacher_head.detach(), num_columns, compute_dtype)
    chunks = _Chunks(
        student=student, teacher=teacher, labels=labels, valid=loss_mask != 0, vocab_start=vocab_start,
        group=group if group is not None and group.size() > 1 else None, weights=weights, vocab_size=vocab_size,
        chunk_tokens=chunk_tokens, head_rows=len(student_head),
        wants_grad=torch.is_grad_enabled() and (student_hidden.requires_grad or student_head.requires_grad),
    )
    return FusedLoss(*HandOut.apply(student_hidden, student_head, chunks))


class HandOut(torch.autograd.Function):
    """Hands the gradients that `chunks.run()` computed with the values to autograd."""

    @staticmethod
    def forward(ctx: Any, student_hidden: Tensor, student_head: Tensor, chunks: Any) -> FusedLoss:
        loss, grad_hidden, grad_head = chunks.run()
        ctx.grads = (grad_hidden, grad_head) if chunks.wants_grad else None
        ctx.dtypes = (student_hidden.dtype, student_head.dtype)
        ctx.mark_non_differentiable(*loss[1:])
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("second backward through fused_linear_loss: its gradients are handed out only once")
        grads, ctx.grads = ctx.grads, None
        # In place, since a second [v, H] float32 tensor would be the peak of memory; hence the single backward.
        scaled = [grad.mul_(grad_loss).to(dtype) if needed else None
                  for grad, dtype, needed in zip(grads, ctx.dtypes, ctx.needs_input_grad[:2], strict=True)]
        return *scaled, None


@dataclasses.dataclass(frozen=True)
class Side:
    """One model's half of the GEMMs: hidden states [T, H] and the rows of its local head that are not padding."""

    hidden: Tensor
    head: Tensor
    compute_dtype: torch.dtype

    @classmethod
    def of(cls, hidden: Tensor, head: Tensor, num_columns: int, compute_dtype: torch.dtype) -> Side:
        head = head[:num_columns]
        mixed_gemm = _MIXED_GEMM and head.is_cuda and head.dtype == hidden.dtype == torch.bfloat16
        return cls(hidden, head if mixed_gemm else head.to(compute_dtype), compute_dtype)

    def inputs(self, rows: slice, valid: Tensor) -> Tensor:
        """Hidden states [C, H] of a chunk in the GEMM's dtype, zero where not valid (a NaN there must not spread)."""
        return self.hidden[rows].to(self.head.dtype).masked_fill(~valid[rows].unsqueeze(1), 0)

    def grad_buffers(self, head_rows: int) -> tuple[Tensor, Tensor]:
        """For the gradients by the hidden states [T, H] and by the head, [head_rows, H] with zeros for its padding."""
        options: Any = {"dtype": self.compute_dtype, "device": self.hidden.device}
        return torch.empty(self.hidden.shape, **options), torch.zeros(head_rows, self.head.shape[1], **options)

    def logits(self, inputs: Tensor, out: Tensor) -> Tensor:
        # `out=` and in-place GEMMs here and below are also what autocast leaves alone.
        if self.head.dtype == self.compute_dtype:
            return torch.mm(inputs, self.head.t(), out=out)
        return torch.mm(inputs, self.head.t(), out_dtype=self.compute_dtype, out=out)

    def add_grads(self, grad_logits: Tensor, inputs: Tensor, grad_hidden: Tensor, grad_head: Tensor) -> None:
        """Write grad_hidden [C, H] and add to grad_head [columns, H], from grad_logits [C, columns]."""
        if self.head.dtype == self.compute_dtype:
            torch.mm(grad_logits, self.head, out=grad_hidden)
            grad_head.addmm_(grad_logits.t(), inputs)
        else:
            grad_logits = grad_logits.to(self.head.dtype)
            torch.mm(grad_logits, self.head, out_dtype=self.compute_dtype, out=grad_hidden)
            torch.addmm(grad_head, grad_logits.t(), inputs, out_dtype=self.compute_dtype, out=grad_head)


@dataclasses.dataclass
class _Chunks:
    """The loop over chunks of tokens. `group` is None where there is nothing to reduce."""

    student: Side
    teacher: Side | None
    labels: Tensor
    valid: Tensor
    vocab_start: int
    vocab_size: int
    group: dist.ProcessGroup | None
    weights: LossWeights
    chunk_tokens: int
    head_rows: int
    wants_grad: bool

    def run(self) -> tuple[FusedLoss, Tensor | None, Tensor | None]:
        """The loss and, where wanted, its gradients by the hidden states [T, Hs] (partial) and the head [v, Hs]."""
        student, sides = self.student, [side for side in (self.student, self.teacher) if side]
        num_tokens, num_columns = len(self.valid), len(student.head)
        dtype, device = student.compute_dtype, student.hidden.device
        chunk = min(self.chunk_tokens, num_tokens)
        buffers = torch.empty((len(sides), chunk, num_columns), dtype=dtype, device=device)
        rows_at_once = _SCRATCH_BYTES.get(device.type, 2**26) // max(1, num_columns * dtype.itemsize)
        scratch = torch.empty((max(1, min(rows_at_once, -(-chunk // 4))), num_columns), dtype=dtype, device=device)
        cross_entropies = torch.zeros(2, num_tokens, dtype=dtype, device=device)
        divergences = torch.zeros(len(TERMS), num_tokens, dtype=dtype, device=device)
        argmax = torch.empty(len(sides), num_tokens, dtype=torch.int64, device=device)
        grad_hidden, grad_head = student.grad_buffers(self.head_rows) if self.wants_grad else (None, None)

        for start in range(0, num_tokens, self.chunk_tokens):
            rows = slice(start, min(start + self.chunk_tokens, num_tokens))
            inputs = [side.inputs(rows, self.valid) for side in sides]
            logits = [side.logits(x, out[: rows.stop - rows.start])
                      for side, x, out in zip(sides, inputs, buffers, strict=True)]
            columns, owned = self._label_columns(rows)
            block, argmax[:, rows] = self._block(logits, columns, owned, self.valid[rows], scratch)
            cross_entropies[: len(sides), rows] = torch.where(self.valid[rows], block.cross_entropies, 0)
            if self.teacher or self.wants_grad:
                self._differentiate(block, divergences[:, rows], scratch)
            if grad_hidden is not None and grad_head is not None:
                if self.weights.ce and num_columns:
                    logits[0].scatter_add_(1, columns, owned.to(dtype) * -self.weights.ce)
                student.add_grads(logits[0], inputs[0], grad_hidden[rows], grad_head[:num_columns])
        return self._sums(divergences, cross_entropies, argmax), grad_hidden, grad_head

    def _reduce(self, tensor: Tensor, op: Any) -> None:
        if self.group is not None:
            dist.all_reduce(tensor, op=op, group=self.group)

    def _label_columns(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Local column of each label [C, 1] (0 where it is not here) and whether it is here and counts [C, 1]."""
        columns = (self.labels[rows] - self.vocab_start).unsqueeze(1)
        owned = (columns >= 0) & (columns < len(self.student.head)) & self.valid[rows].unsqueeze(1)
        return columns.masked_fill(~owned, 0), owned

    def _block(self, logits: list[Tensor], columns: Tensor, owned: Tensor, valid: Tensor,
               scratch: Tensor) -> tuple[Block, Tensor]:
        """Centre the logits in place and reduce what the losses need of the whole vocabulary: two all-reduces.

        Returns the chunk, and the global id of each side's maximum [sides, C] where this rank holds it, else
        `NO_TOKEN`.
        """
        temperature = self.weights.temperature if self.teacher else 1.0
        sums = _cosine_sums(logits, scratch) if self.teacher and self.weights.cosine else {}
        maxima, label_logits, held = self._centre(logits, columns, owned)
        for z in logits if temperature != 1.0 else ():
            z.div_(temperature)
        sums |= self._exponential_sums(logits, temperature, scratch)
        packed = torch.stack(list(sums.values()))
        self._reduce(packed, dist.ReduceOp.SUM)
        block = Block(logits=logits, valid=valid, sums=dict(zip(sums, packed, strict=True)), maxima=maxima,
                      label_logits=label_logits, weights=self.weights, temperature=temperature,
                      vocab_size=self.vocab_size)
        return block, held

    def _centre(self, logits: list[Tensor], columns: Tensor, owned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Subtract the global maximum of each token, in place, from each side's logits [C, columns].

        Returns the maxima [sides, C], the shifted logits of the labels [sides, C], -inf where no rank has the label,
        and the global id of the maximum [sides, C] where this rank holds it, else `NO_TOKEN`.
        """
        num_sides = len(logits)
        stats = logits[0].new_full((2 * num_sides, len(columns)), -torch.inf)
        argmax = torch.zeros_like(columns).t().repeat(num_sides, 1)
        if logits[0].shape[1]:  # a shard may be nothing but padding
            for side, z in enumerate(logits):
                stats[side], argmax[side] = z.max(dim=1)
                stats[num_sides + side] = z.gather(1, columns).masked_fill(~owned, -torch.inf).squeeze(1)
        local_maxima = stats[:num_sides].clone()
        self._reduce(stats, dist.ReduceOp.MAX)
        maxima, label_logits = stats[:num_sides], stats[num_sides:]
        for z, maximum in zip(logits, maxima, strict=True):
            z.sub_(maximum.unsqueeze(1))
        held = torch.where(local_maxima == maxima, argmax + self.vocab_start, NO_TOKEN)
        return maxima, label_logits - maxima, held

    def _exponential_sums(self, logits: list[Tensor], temperature: float, scratch: Tensor) -> dict[str, Tensor]:
        """This rank's sums [C] over its columns: of exponentials, and where asked at temperature 1 and crosswise."""
        names = ["student", "teacher"][: len(logits)]
        sums = {name: z.new_empty(len(z)) for name, z in zip(names, logits, strict=True)}
        if temperature != 1.0:
            sums |= {f"{name}_at_1": torch.empty_like(sums[name]) for name in names}
        if self.teacher and self.weights.reverse_kl:
            sums["cross"] = torch.empty_like(sums["student"])
        for rows in _blocks(logits[0], scratch):
            for name, z in zip(names, logits, strict=True):
                work = torch.exp(z[rows], out=scratch[: rows.stop - rows.start])
                torch.sum(work, 1, out=sums[name][rows])
                if name == "student" and "cross" in sums:
                    sums["cross"][rows] = work.mul_(logits[0][rows] - logits[1][rows]).sum(1)
                if temperature != 1.0:
                    torch.sum(torch.mul(z[rows], temperature, out=work).exp_(), 1, out=sums[f"{name}_at_1"][rows])
        return sums

    def _differentiate(self, block: Block, divergences: Tensor, scratch: Tensor) -> None:
        """Turn the student's logits of the chunk into the loss's gradient by them (labels apart), fill divergences."""
        simple = block.temperature == 1.0 and self.weights.kl_and_ce_only
        js_parts = None
        if not simple and self.teacher and self.weights.js:
            js_parts = torch.cat([js_student_part(block, rows) for rows in _blocks(block.logits[0], scratch)])
            self._reduce(js_parts, dist.ReduceOp.SUM)
        for rows in _blocks(block.logits[0], scratch):
            if self.teacher is None:
                scale = (block.valid[rows] / block.sums["student"][rows]).mul_(self.weights.ce).unsqueeze(1)
                block.logits[0][rows].exp_().mul_(scale)
            elif simple:
                divergences[0, rows] = forward_kl_block(block, rows, scratch[: rows.stop - rows.start])
            else:
                divergences[:, rows] = general_block(block, rows, js_parts)

    def _sums(self, divergences: Tensor, cross_entropies: Tensor, argmax: Tensor) -> FusedLoss:
        """Sum per-token values over the micro-batch and, where they are parts, over TP."""
        parts = divergences.sum(1)
        agreement = torch.zeros_like(parts[0])
        if self.teacher:
            self._reduce(parts, dist.ReduceOp.SUM)
            if self.group is not None:
                parts[TERMS.index("cosine")] /= self.group.size()  # every rank has the whole of it
            self._reduce(argmax, dist.ReduceOp.MIN)
            agreement = ((argmax[0] == argmax[1]) & self.valid).sum().to(parts.dtype)
        ce, teacher_ce = cross_entropies[0].sum(), cross_entropies[1].sum()
        terms = dict(zip(TERMS, parts, strict=True))
        loss = self.weights.total(terms | {"ce": ce})
        return FusedLoss(loss=loss, **terms, ce=ce, teacher_ce=teacher_ce, agreement=agreement,
                         num_tokens=self.valid.sum().to(parts.dtype))


def _blocks(logits: Tensor, scratch: Tensor) -> list[slice]:
    """Rows that are worked on at a time: as many as `scratch` has."""
    return [slice(start, min(start + len(scratch), len(logits))) for start in range(0, len(logits), len(scratch))]


def _cosine_sums(logits: list[Tensor], scratch: Tensor) -> dict[str, Tensor]:
    """This rank's part of the dot product of both sides' logits and of their squares, [C] each."""
    pairs = {"dot": (0, 1), "student_square": (0, 0), "teacher_square": (1, 1)}
    sums = {name: logits[0].new_empty(len(logits[0])) for name in pairs}
    for rows in _blocks(logits[0], scratch):
        for name, (one, other) in pairs.items():  # multiplied, then summed pairwise: a GEMV is biased in float32
            work = torch.mul(logits[one][rows], logits[other][rows], out=scratch[: rows.stop - rows.start])
            torch.sum(work, 1, out=sums[name][rows])
    return sums
