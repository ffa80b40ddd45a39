"""The teacher, streamed: frozen, run forward in the same step, handing over hidden states and never logits.

It is no parameter of the trained module, in no optimizer, gradient buffer or checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from nemo_minitron.arch import ArchSpec
from nemo_minitron.data.batch import Batch
from nemo_minitron.distill.terms import TeacherStates, tokens_first, vocabulary_shard
from nemo_minitron.distill.top_k import TopK, teacher_top_k
from nemo_minitron.model.build import load_model, transformer_config
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.layout import Layout
from nemo_minitron.parallel.schedule import forward_only


class Teacher:
    """This rank's shard of the frozen teacher, in the student's layout.

    With one pipeline stage it runs when a micro-batch asks for it. With several, a stage inside the
    student's schedule cannot wait for the other stages' teacher, so `prepare` runs all micro-batches of
    the step through a forward-only pipeline pass of the teacher first.
    """

    def __init__(self, arch: ArchSpec, path: Path, layout: Layout, *, bf16: bool = False, top_k: int | None = None,
                 chunk_tokens: int = 256) -> None:
        """Read this rank's slices of the checkpoint in `path`.

        With `top_k` it hands over its likeliest tokens, worked out `chunk_tokens` tokens at a time.
        """
        self.arch = arch
        self.layout = layout
        self.model = load_model(arch, path, transformer_config(arch, layout, bf16=bf16))
        self.model.requires_grad_(False)
        self.model.eval()
        self.top_k = top_k
        self.chunk_tokens = chunk_tokens
        self._prepared: list[TeacherStates | TopK] = []

    @property
    def head(self) -> torch.Tensor:
        """LM head rows of this TP rank, `[v, Ht]` (last stage only)."""
        return self.model.head()

    def prepare(self, batches: list[Batch]) -> None:
        """Where the pipeline has several stages: compute the states of all micro-batches of the next step.

        Every rank must call this before the student's schedule starts; `states` then hands them out in order.
        """
        if self.runs_ahead:
            self._prepared = self._over(batches, len(batches))

    def top_k_of(self, batches: Iterable[Batch], *, num_microbatches: int) -> list[TopK]:
        """The likeliest tokens of each of `batches`, in a pass of its own; nothing on stages before the last."""
        assert self.top_k is not None
        return [states for states in self._over(batches, num_microbatches) if isinstance(states, TopK)]

    def _over(self, batches: Iterable[Batch], num_microbatches: int) -> list[TeacherStates | TopK]:
        return forward_only(self.model, batches, num_microbatches=num_microbatches, consume=self._hand_over)

    @property
    def runs_ahead(self) -> bool:
        """Whether it must run before the student's schedule: a pipeline of stages."""
        return self.layout.pp > 1

    def states(self, batch: Batch) -> TeacherStates | TopK:
        """What the loss needs of `batch`, without gradient (last stage only)."""
        if self.runs_ahead:
            return self._prepared.pop(0)
        with torch.no_grad():
            return self._hand_over(self.model(batch.tokens, batch.position_ids, None), batch)

    def _hand_over(self, hidden: torch.Tensor, batch: Batch) -> TeacherStates | TopK:
        assert groups.is_last_stage()
        hidden = tokens_first(hidden, sequence_parallel=self.model.config.sequence_parallel)
        if self.top_k is None:
            return TeacherStates(hidden=hidden, head=self.head)
        return teacher_top_k(hidden, self.head, k=self.top_k, labels=batch.labels.t().reshape(-1),
                             loss_mask=batch.loss_mask.t().reshape(-1), chunk_tokens=self.chunk_tokens,
                             **vocabulary_shard(self.model))
