"""The arithmetic of the fused losses on one block of tokens, elementwise over this rank's columns. Plain torch.

Per-token sums over the whole vocabulary are given (`Block.sums`); what is returned are this rank's parts of per-token
values, and the student's logits are overwritten with the gradient of the loss by them. Everything is written with the
log ratio r = log p_s - log p_t and t = tanh(r / 2) = (p_s - p_t) / (p_s + p_t), so that values are of second order in r
term by term: rounding of the normalisers does not drown a small divergence, and nothing overflows.

Shape letters: c tokens of the block, C tokens of the chunk, columns: this rank's rows of the LM head without padding.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nemo_minitron.distill.losses import LossWeights

TERMS = ("kl", "reverse_kl", "js", "mse", "cosine")
"""Order of the per-token values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A chunk of tokens, after the reductions over the vocabulary."""

    logits: list[Tensor]
    """Of the student and, with a teacher, the teacher: [C, columns], centred and divided by the temperature."""
    valid: Tensor  # [C] bool
    sums: dict[str, Tensor]
    """[C] each, global: sums of exponentials ("student", "teacher", and with "_at_1" at temperature 1), and where asked
    "cross" (sum of the student's exponentials times the logits' difference), "dot" and "..._square" of raw logits."""
    maxima: Tensor  # [sides, C], what was subtracted from the raw logits
    label_logits: Tensor  # [sides, C], centred, at temperature 1
    weights: LossWeights
    temperature: float
    vocab_size: int

    @property
    def cross_entropies(self) -> Tensor:
        """-log p(label) of each side at temperature 1, [sides, C], nats."""
        suffix = "" if self.temperature == 1.0 else "_at_1"
        normalisers = [self.sums[name + suffix] for name in ("student", "teacher")[: len(self.logits)]]
        return torch.stack(normalisers).log() - self.label_logits

    def log_normaliser_gap(self, rows: slice) -> Tensor:
        """log N_t - log N_s, [c, 1]."""
        return (self.sums["teacher"][rows].log() - self.sums["student"][rows].log()).unsqueeze(1)


def forward_kl_block(block: Block, rows: slice, scratch: Tensor) -> Tensor:
    """KL(teacher || student) and cross-entropy at temperature 1, in place, with the one buffer `scratch` [c, columns].

    KL's summand is (p_s - p_t) - p_t * r, with p_s - p_t = (p_s + p_t) * t. Returns this rank's part of it, [c].
    """
    student, teacher = block.logits[0][rows], block.logits[1][rows]
    valid = block.valid[rows]
    half_ratio = torch.sub(student, teacher, out=scratch).add_(block.log_normaliser_gap(rows)).mul_(0.5)
    teacher_probs = teacher.exp_().mul_((valid / block.sums["teacher"][rows]).unsqueeze(1))  # 0 where not valid
    scale = (valid / block.sums["student"][rows]).unsqueeze(1)
    probs_sum = torch.addcmul(teacher_probs, student.exp_(), scale, out=student)
    teacher_probs.mul_(half_ratio)
    difference = half_ratio.tanh_().mul_(probs_sum)
    value = torch.add(difference, teacher_probs, alpha=-2, out=teacher_probs).sum(1).clamp_min_(0)
    # p_s = ((p_s + p_t) + (p_s - p_t)) / 2
    kl, ce = block.weights.kl, block.weights.ce
    probs_sum.mul_(ce / 2).add_(difference, alpha=kl + ce / 2)
    return value


def js_student_part(block: Block, rows: slice) -> Tensor:
    """This rank's part of KL(p_s || m) with m = (p_s + p_t) / 2, per token [c]: the gradient needs all of it."""
    _, student_probs, teacher_probs, tanh = _probabilities(block, rows)
    return ((student_probs + teacher_probs) / 2 * torch.special.xlog1py(1 + tanh, tanh)).sum(1)


def general_block(block: Block, rows: slice, js_student_parts: Tensor | None) -> Tensor:
    """Any of the losses at any temperature; needs buffers for a few [c, columns]. Returns values [len(TERMS), c].

    With z the student's logits divided by the temperature: dKL/dz = p_s - p_t, dRKL/dz = p_s * (r - RKL), and
    dJS/dz = p_s * (log(p_s / m) - KL(p_s || m)) / 2.
    """
    weights, temperature = block.weights, block.temperature
    values = block.logits[0].new_zeros(len(TERMS), rows.stop - rows.start)
    grad = _raw_logit_terms(block, rows, values)
    if weights.ce:
        suffix = "" if temperature == 1.0 else "_at_1"
        scale = (block.valid[rows] / block.sums["student" + suffix][rows]).mul_(weights.ce).unsqueeze(1)
        grad += (block.logits[0][rows] * temperature).exp_() * scale
    ratio, student_probs, teacher_probs, tanh = _probabilities(block, rows)
    difference = (student_probs + teacher_probs) * tanh
    values[0] = (difference - teacher_probs * ratio).sum(1).clamp_min_(0)
    by_scaled = difference * weights.kl
    if weights.reverse_kl:
        values[1] = (student_probs * ratio - difference).sum(1).clamp_min_(0)
        reverse = (block.sums["cross"] / block.sums["student"])[rows].unsqueeze(1) + block.log_normaliser_gap(rows)
        by_scaled += weights.reverse_kl * student_probs * (ratio - reverse)
    if weights.js:
        assert js_student_parts is not None
        middle = (student_probs + teacher_probs) / 2
        of_student = middle * torch.special.xlog1py(1 + tanh, tanh)
        values[2] = (of_student + middle * torch.special.xlog1py(1 - tanh, -tanh)).sum(1).div_(2).clamp_min_(0)
        by_scaled += weights.js / 2 * (of_student - student_probs * js_student_parts[rows].unsqueeze(1))
    grad += by_scaled * temperature  # the loss is temperature^2 times the divergence, whose z is logits / temperature
    block.logits[0][rows] = grad
    return values


def _probabilities(block: Block, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r, p_s, p_t and tanh(r / 2), [c, columns] each; probabilities are 0 where the token is not valid."""
    student, teacher = block.logits[0][rows], block.logits[1][rows]
    ratio = (student - teacher).add_(block.log_normaliser_gap(rows))
    scales = [(block.valid[rows] / block.sums[name][rows]).unsqueeze(1) for name in ("student", "teacher")]
    return ratio, student.exp() * scales[0], teacher.exp() * scales[1], torch.tanh(ratio / 2)


def _raw_logit_terms(block: Block, rows: slice, values: Tensor) -> Tensor:
    """Gradient [c, columns] of mean squared error and cosine of raw logits; fills their rows of `values`."""
    weights = block.weights
    grad = torch.zeros_like(block.logits[0][rows])
    if not (weights.mse or weights.cosine):
        return grad
    valid = block.valid[rows].unsqueeze(1).to(grad.dtype)
    student, teacher = (z[rows] * block.temperature + maximum[rows].unsqueeze(1)
                        for z, maximum in zip(block.logits, block.maxima, strict=True))
    if weights.mse:
        gap = (student - teacher) * valid
        values[3] = gap.square().sum(1) / block.vocab_size
        grad += gap * (2 * weights.mse / block.vocab_size)
    if weights.cosine:
        tiny = torch.finfo(grad.dtype).tiny
        student_square, teacher_square = (block.sums[name][rows].clamp_min(tiny)
                                          for name in ("student_square", "teacher_square"))
        product = (student_square.sqrt() * teacher_square.sqrt()).unsqueeze(1)
        cosine = block.sums["dot"][rows].unsqueeze(1) / product
        values[4] = (valid * (1 - cosine)).squeeze(1)
        grad -= weights.cosine * valid * (teacher / product - student * (cosine / student_square.unsqueeze(1)))
    return grad
