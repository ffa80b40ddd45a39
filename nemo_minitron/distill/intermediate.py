"""Losses of intermediate states on any pipeline stage: computed and attached where the student's layer lives.

The gradient of a term joins the backward pass at its tap, the way Megatron's auxiliary losses of experts do, but with a
scale of our own: Megatron sets that one for mixtures of experts alone. Terms are sums over valid tokens under the same
per-token contract as the logits' loss, so they have the same denominator. arXiv:2407.14679, section 3: `L = L_logits +
alpha L_is` with `alpha = L_logits / L_is`. That ratio is of the step before (1 at the first): in the middle of a step
the last stage alone knows L_logits, and a collective inside the schedule could deadlock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from nemo_minitron.data.batch import Batch
from nemo_minitron.distill.layer_map import Term
from nemo_minitron.distill.state_losses import cosine_of_states, mse_of_states, relation_kl
from nemo_minitron.distill.taps import States, tap
from nemo_minitron.model.build import HiddenStateGPT
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.cpu import device

TeacherParts = Mapping[tuple[int, int], torch.Tensor]
"""(term, part) -> the teacher's state in the student's layout: `[S, B, Ht]` or this TP rank's part (`taps.States`)."""


class Projection(torch.nn.Module):
    """The one linear map from the student's width to the teacher's that all terms share; weight `[Ht, Hs]`, no bias.

    Every pipeline stage and TP rank has a copy of the same values. It is trained and goes into resume points, and never
    into an exported checkpoint.
    """

    def __init__(self, teacher_size: int, student_size: int, *, kept: Sequence[int] | None, dtype: torch.dtype,
                 sequence_parallel: bool, seed: int = 0) -> None:
        """With `kept`, start by putting each of the student's channels where it was in the teacher; else at random."""
        super().__init__()
        if kept is not None and len(kept) == student_size and max(kept) < teacher_size:
            weight = torch.zeros(teacher_size, student_size)
            weight[torch.tensor(kept), torch.arange(student_size)] = 1.0
        else:
            weight = torch.randn(teacher_size, student_size, generator=torch.Generator().manual_seed(seed))
            weight /= student_size**0.5
        self.weight = torch.nn.Parameter(weight.to(device(), dtype))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]  # its gradient is summed over TP
        # counted once in the norm of the gradient, though every stage has it
        self.weight.shared = groups.pp_rank() > 0  # type: ignore[attr-defined]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`[..., Hs]` -> `[..., Ht]`, float32 or wider."""
        wide = torch.promote_types(states.dtype, torch.float32)
        return torch.nn.functional.linear(states.to(wide), self.weight.to(wide))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """The weight as one tensor that all ranks have a copy of."""
        replica = (groups.pp_rank(), groups.tp_rank(), groups.dp_rank())
        key = f"{prefix}weight"
        return {key: ShardedTensor.from_rank_offsets(key, self.weight, replica_id=replica)}


class IntermediateLosses:
    """The terms of a recipe on one student; `comparing` says with what, and `step_means` ends a step."""

    def __init__(self, terms: Sequence[Term], *, alpha: float | None, relation_heads: int) -> None:
        """`alpha` fixes the weight of all terms together; None: the rule above. `relation_heads`: over all TP ranks."""
        self.terms = tuple(terms)
        self.fixed_alpha = alpha
        self.alpha = 1.0 if alpha is None else alpha
        self.relation_heads = relation_heads
        self.projection: Projection | None = None
        self._sums = [torch.zeros((), dtype=torch.float64, device=device()) for _ in self.terms]
        self._teacher: TeacherParts | None = None

    def attach_to(self, student: HiddenStateGPT, *, teacher_size: int, kept: Sequence[int] | None = None) -> None:
        """Tap this rank's shard of `student`, and give it a projection where the teacher's hidden size is another.

        Args:
            student: not wrapped yet, so that Megatron's gradient buffers and optimizer take the projection in.
            teacher_size: the teacher's hidden size.
            kept: the channels of the teacher that the student was cut from, where known.
        """
        config = student.config
        self._config = config
        if teacher_size != config.hidden_size and any(term.state != "attention" for term in self.terms):
            self.projection = Projection(teacher_size, config.hidden_size, kept=kept, dtype=config.params_dtype,
                                         sequence_parallel=config.sequence_parallel)
            student.distillation_projection = self.projection
        for index, term in enumerate(self.terms):
            tap(student, term.state, term.student_layer, partial(self._compare, index))

    @contextmanager
    def comparing(self, teacher: TeacherParts, batch: Batch) -> Iterator[None]:
        """Student forward passes inside are of `batch`, and are compared with `teacher`."""
        valid_SB = batch.loss_mask.t() != 0
        if self._config.sequence_parallel:
            self._valid_shard_SB = valid_SB.chunk(groups.tp_size())[groups.tp_rank()]
        self._valid_SB, self._document_ids_BS, self._teacher = valid_SB, batch.document_ids, teacher
        try:
            yield
        finally:
            self._teacher = None

    def _compare(self, index: int, states: States) -> States:
        if self._teacher is None:
            return states
        value = self._value(index, states)
        self._sums[index] += value.detach().double()
        if not (torch.is_grad_enabled() and value.requires_grad):
            return states
        return (_Attach.apply(states[0], self.alpha * self.terms[index].weight * value, self._config), *states[1:])

    def _value(self, index: int, states: States) -> torch.Tensor:
        """Sum over this rank's valid tokens; of attention, its heads' part of the mean over all relation heads."""
        assert self._teacher is not None
        term = self.terms[index]
        if term.state == "attention":
            local = self.relation_heads // groups.tp_size()
            parts = [relation_kl(own, self._teacher[index, part], self._valid_SB, relation_heads=local,
                                 document_ids_BS=self._document_ids_BS)
                     for part, own in enumerate(states)]
            return torch.stack(parts).sum() / self.relation_heads
        valid = self._valid_shard_SB if self._config.sequence_parallel else self._valid_SB
        own = states[0] if self.projection is None else self.projection(states[0])
        loss = cosine_of_states if term.loss == "cosine" else mse_of_states
        return loss(own, self._teacher[index, 0], valid)

    def sum_gradients(self) -> None:
        """All-reduce the projection's gradient over the pipeline stages; before the gradients are reduced over DP.

        Every rank must call this.
        """
        if self.projection is not None and parallel_state.get_pipeline_model_parallel_world_size() > 1:
            weight: Any = self.projection.weight
            dist.all_reduce(weight.main_grad, group=parallel_state.get_pipeline_model_parallel_group())

    def take_means(self, num_tokens: float) -> dict[str, float]:
        """Means of each term over the global number of valid tokens since the last call (one all-reduce over all
        ranks).

        And under `intermediate` their weighted sum. Every rank must call this and gets the result.
        """
        replicated = not self._config.sequence_parallel
        sums = torch.stack([value / (groups.tp_size() if replicated and term.state != "attention" else 1)
                            for term, value in zip(self.terms, self._sums, strict=True)])
        dist.all_reduce(sums)
        for value in self._sums:
            value.zero_()
        means = [value / max(num_tokens, 1.0) for value in sums.tolist()]
        weighted = sum(term.weight * mean for term, mean in zip(self.terms, means, strict=True))
        return {"intermediate": weighted, **{term.name: mean for term, mean in zip(self.terms, means, strict=True)}}

    def step_means(self, logits_loss: float, num_tokens: float) -> dict[str, float]:
        """`take_means` of the step just done, with the `alpha` it had; then the next step's is set."""
        means = self.take_means(num_tokens) | {"alpha": self.alpha}
        if self.fixed_alpha is None and means["intermediate"] > 0:
            self.alpha = logits_loss / means["intermediate"]
        return means


class _Attach(torch.autograd.Function):
    """Hands `states` on; in backward, starts a backward of `loss` beside their gradient."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, loss: torch.Tensor, config: Any) -> torch.Tensor:
        ctx.config, ctx.like = config, torch.ones_like(loss)
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        scale = ctx.config.grad_scale_func  # of loss scaling in fp16; None or the identity otherwise
        return grad, ctx.like if scale is None else scale(ctx.like), None
