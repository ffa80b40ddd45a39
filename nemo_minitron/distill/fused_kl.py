"""Forward KL and cross-entropy of LM heads over a sharded vocabulary, without a `[tokens, vocab]` tensor.

The loss of arXiv:2407.14679, section 3 (`losses.py` states the formulas), computed from final hidden states: each chunk
of tokens is multiplied with this rank's rows of both LM heads, and the value and its gradient with respect to the
student's logits are formed while the chunk's logits are at hand. It knows nothing of Megatron, and does not reduce the
gradient of the hidden states over tensor parallel: that is for the mapping around it.

Shape letters: T tokens of the micro-batch, C tokens of a chunk, H hidden, v rows of the LM head on this TP rank.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# GEMMs that read bfloat16 and return float32 came with torch 2.8, for CUDA only.
_MIXED_GEMM = hasattr(torch.ops.aten.mm, "dtype_out")
_NO_TOKEN = torch.iinfo(torch.int64).max


class FusedLoss(NamedTuple):
    """Sums over the valid tokens of a micro-batch, the same on every TP rank; the caller owns the denominator.

    All are scalars, float64 for float64 hidden states and float32 otherwise. Only `loss` carries a gradient.
    """

    loss: Tensor  # kl_weight * kl + ce_weight * ce, nats
    kl: Tensor  # KL(teacher || student), nats; 0 without a teacher
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
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    chunk_tokens: int = 256,
) -> FusedLoss:
    """Sum over valid tokens of `kl_weight * KL(teacher || student) + ce_weight * CE(student)`, in nats.

    Every rank of `group` must call this with the same tokens. Collectives over it, none where it is None or of size 1:
    two all-reduces a chunk (max, sum of a few numbers per token) and, with a teacher, two a micro-batch.

    Logits, gradients and sums are in float32 (float64 for float64 hidden states), also for bfloat16 inputs: on CUDA
    their GEMMs read bfloat16 (so the gradient of the logits is rounded to it) and return float32; elsewhere, and with
    torch < 2.8, both heads are converted once a call.
    Memory beyond inputs and gradients is 3 chunks of logits [C, v] (1 without a teacher; half a chunk more where
    bfloat16 GEMMs are used). With `chunk_tokens` = 256, the CPU optimum measured at v = 32768, H = 512 and 1024;
    a GPU wants 1024 and more.

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
        kl_weight: factor of the KL; ignored without a teacher.
        ce_weight: factor of the student's cross-entropy.
        chunk_tokens: tokens whose logits exist at a time.

    Returns:
        The sums. Gradients are computed here, where grad mode is on and the student needs them; `backward` only scales
        them, and a second one through the same graph raises RuntimeError.
    """
    assert (teacher_hidden is None) == (teacher_head is None)
    assert len(student_hidden) == len(labels) == len(loss_mask) and chunk_tokens > 0
    compute_dtype = torch.promote_types(student_hidden.dtype, torch.float32)
    num_columns = min(max(vocab_size - vocab_start, 0), len(student_head))
    student = _Side.of(student_hidden.detach(), student_head.detach(), num_columns, compute_dtype)
    teacher = None
    if teacher_hidden is not None and teacher_head is not None:
        assert len(teacher_hidden) == len(student_hidden) and len(teacher_head) == len(student_head)
        teacher = _Side.of(teacher_hidden.detach(), teacher_head.detach(), num_columns, compute_dtype)
    chunks = _Chunks(
        student=student, teacher=teacher, labels=labels, valid=loss_mask != 0, vocab_start=vocab_start,
        group=group if group is not None and group.size() > 1 else None, kl_weight=kl_weight, ce_weight=ce_weight,
        chunk_tokens=chunk_tokens, head_rows=len(student_head),
        wants_grad=torch.is_grad_enabled() and (student_hidden.requires_grad or student_head.requires_grad),
    )
    return FusedLoss(*_FusedLinearLoss.apply(student_hidden, student_head, chunks))


class _FusedLinearLoss(torch.autograd.Function):
    """Hands the gradients that the forward computed to autograd."""

    @staticmethod
    def forward(ctx: Any, student_hidden: Tensor, student_head: Tensor, chunks: _Chunks) -> FusedLoss:
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
class _Side:
    """One model's half of the GEMMs: hidden states [T, H] and the rows of its local head that are not padding."""

    hidden: Tensor
    head: Tensor
    compute_dtype: torch.dtype

    @classmethod
    def of(cls, hidden: Tensor, head: Tensor, num_columns: int, compute_dtype: torch.dtype) -> _Side:
        head = head[:num_columns]
        mixed_gemm = _MIXED_GEMM and head.is_cuda and head.dtype == hidden.dtype == torch.bfloat16
        return cls(hidden, head if mixed_gemm else head.to(compute_dtype), compute_dtype)

    def inputs(self, rows: slice, valid: Tensor) -> Tensor:
        """Hidden states [C, H] of a chunk in the GEMM's dtype, zero where not valid (a NaN there must not spread)."""
        return self.hidden[rows].to(self.head.dtype).masked_fill(~valid[rows].unsqueeze(1), 0)

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

    student: _Side
    teacher: _Side | None
    labels: Tensor
    valid: Tensor
    vocab_start: int
    group: dist.ProcessGroup | None
    kl_weight: float
    ce_weight: float
    chunk_tokens: int
    head_rows: int
    wants_grad: bool

    def run(self) -> tuple[FusedLoss, Tensor | None, Tensor | None]:
        """The loss and, where wanted, its gradients by the hidden states [T, Hs] (partial) and the head [v, Hs]."""
        student, sides = self.student, [side for side in (self.student, self.teacher) if side]
        num_tokens, num_columns = len(self.valid), len(student.head)
        dtype, device = student.compute_dtype, student.hidden.device
        # A buffer each for the logits of both, and for their difference.
        shape = (2 * len(sides) - 1, min(self.chunk_tokens, num_tokens), num_columns)
        buffers = torch.empty(shape, dtype=dtype, device=device)
        cross_entropies = torch.zeros(2, num_tokens, dtype=dtype, device=device)
        local_kl = torch.zeros(num_tokens, dtype=dtype, device=device)
        argmax = torch.empty(len(sides), num_tokens, dtype=torch.int64, device=device)
        grad_hidden = grad_head = None
        if self.wants_grad:
            grad_hidden = torch.empty(student.hidden.shape, dtype=dtype, device=device)
            grad_head = torch.zeros(self.head_rows, student.head.shape[1], dtype=dtype, device=device)

        for start in range(0, num_tokens, self.chunk_tokens):
            rows = slice(start, min(start + self.chunk_tokens, num_tokens))
            work = buffers[:, : rows.stop - rows.start]
            inputs = [side.inputs(rows, self.valid) for side in sides]
            logits = [side.logits(x, out) for side, x, out in zip(sides, inputs, work, strict=False)]
            columns, owned = self._label_columns(rows)
            shifted_label_logits, argmax[:, rows] = self._centre(logits, columns, owned)
            if self.teacher:
                torch.sub(logits[0], logits[1], out=work[2])
            normalisers = torch.stack([z.exp_().sum(1) for z in logits])
            self._reduce(normalisers, dist.ReduceOp.SUM)
            nats = normalisers.log() - shifted_label_logits
            cross_entropies[: len(sides), rows] = torch.where(self.valid[rows], nats, 0)
            if self.teacher:
                local_kl[rows] = self._kl(work, normalisers, self.valid[rows])
            if grad_hidden is not None and grad_head is not None:
                grad_logits = self._grad_logits(work, normalisers, columns, owned, self.valid[rows])
                student.add_grads(grad_logits, inputs[0], grad_hidden[rows], grad_head[:num_columns])
        return self._sums(local_kl, cross_entropies, argmax), grad_hidden, grad_head

    def _reduce(self, tensor: Tensor, op: Any) -> None:
        if self.group is not None:
            dist.all_reduce(tensor, op=op, group=self.group)

    def _label_columns(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Local column of each label [C, 1] (0 where it is not here) and whether it is here and counts [C, 1]."""
        columns = (self.labels[rows] - self.vocab_start).unsqueeze(1)
        owned = (columns >= 0) & (columns < len(self.student.head)) & self.valid[rows].unsqueeze(1)
        return columns.masked_fill(~owned, 0), owned

    def _centre(self, logits: list[Tensor], columns: Tensor, owned: Tensor) -> tuple[Tensor, Tensor]:
        """Subtract the global maximum of each token, in place, from each side's logits [C, columns].

        Returns the shifted logits of the labels [sides, C], -inf where no rank has the label, and the global id of the
        maximum [sides, C] where this rank holds it, else `_NO_TOKEN`.
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
        held = torch.where(local_maxima == maxima, argmax + self.vocab_start, _NO_TOKEN)
        return label_logits - maxima, held

    @staticmethod
    def _kl(work: Tensor, normalisers: Tensor, valid: Tensor) -> Tensor:
        """This rank's part of KL(teacher || student) per token [C].

        Args:
            work: [3, C, columns], the exponentials of the student's and the teacher's shifted logits, and the shifted
                logits of the student minus those of the teacher. Overwritten: p_s + p_t, scratch, p_s - p_t.
            normalisers: [2, C], global sums of the exponentials of student and teacher.
            valid: [C]

        With d = log p_t - log p_s the summand is p_t * (expm1(-d) + d) = (p_s - p_t) + p_t * d: it is never negative
        and of second order in d, so rounding of the normalisers does not drown a small KL. The difference
        p_s - p_t = (p_s + p_t) * tanh(-d / 2) has the same virtue, and does not overflow as expm1 does.
        """
        student_exp, teacher_exp, gap = work.unbind()
        scales = (valid / normalisers).unsqueeze(2)  # 0 where not valid, which zeroes values and gradients
        half_log_ratio = (normalisers[1].log() - normalisers[0].log()).mul_(0.5).unsqueeze(1)
        torch.add(half_log_ratio, gap, alpha=0.5, out=gap)  # -d / 2
        teacher_probs = teacher_exp.mul_(scales[1])
        probs_sum = torch.addcmul(teacher_probs, student_exp, scales[0], out=student_exp)
        teacher_probs.mul_(gap)
        gap.tanh_().mul_(probs_sum)
        return torch.add(gap, teacher_probs, alpha=-2, out=teacher_probs).sum(1).clamp_min_(0)

    def _grad_logits(self, work: Tensor, normalisers: Tensor, columns: Tensor, owned: Tensor, valid: Tensor) -> Tensor:
        """Gradient of the loss by the student's logits [C, columns], in one of the chunk's buffers `work`."""
        if self.teacher:
            # p_s = ((p_s + p_t) + (p_s - p_t)) / 2
            grad = work[2].mul_(self.kl_weight + self.ce_weight / 2)
            if self.ce_weight:
                grad.add_(work[0], alpha=self.ce_weight / 2)
        else:
            grad = work[0].mul_((valid / normalisers[0]).mul_(self.ce_weight).unsqueeze(1))
        if self.ce_weight and grad.shape[1]:
            grad.scatter_add_(1, columns, owned.to(grad.dtype) * -self.ce_weight)
        return grad

    def _sums(self, local_kl: Tensor, cross_entropies: Tensor, argmax: Tensor) -> FusedLoss:
        """Sum per-token values over the micro-batch and, where they are parts, over TP."""
        kl = local_kl.sum()
        agreement = torch.zeros_like(kl)
        if self.teacher:
            self._reduce(kl, dist.ReduceOp.SUM)
            self._reduce(argmax, dist.ReduceOp.MIN)
            agreement = ((argmax[0] == argmax[1]) & self.valid).sum().to(kl.dtype)
        ce, teacher_ce = cross_entropies[0].sum(), cross_entropies[1].sum()
        loss = torch.zeros_like(kl)
        for weight, value in ((self.kl_weight, kl), (self.ce_weight, ce)):
            if weight:  # an infinite cross-entropy of no weight must not make the loss NaN
                loss = loss + weight * value
        return FusedLoss(loss, kl, ce, teacher_ce, agreement, self.valid.sum().to(kl.dtype))
