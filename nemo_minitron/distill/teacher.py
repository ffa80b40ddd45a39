"""The teacher, streamed: frozen, run forward in the same step, handing over hidden states and never logits.

It is no parameter of the trained module, in no optimizer, gradient buffer or checkpoint. It may have a layout and a
precision of its own; its LM head is always in the student's TP layout, on the student's last stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)

from nemo_minitron.arch import ArchSpec
from nemo_minitron.checkpoint.load import read_head
from nemo_minitron.data.batch import Batch
from nemo_minitron.distill.exchange import deliver, gather_batches
from nemo_minitron.distill.intermediate import TeacherParts
from nemo_minitron.distill.layer_map import Term, stage_of
from nemo_minitron.distill.routing import FINAL, rank_of, share, transfers
from nemo_minitron.distill.taps import States, tap
from nemo_minitron.distill.terms import TeacherStates, tokens_first
from nemo_minitron.distill.top_k import TopK, teacher_top_k
from nemo_minitron.model.build import build_model, padded_vocab_size, read_weights, transformer_config
from nemo_minitron.model.forward import forward_batch
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.beside import GroupsBeside
from nemo_minitron.parallel.clock import Stopwatch
from nemo_minitron.parallel.cpu import device
from nemo_minitron.parallel.layout import Layout
from nemo_minitron.parallel.schedule import forward_only


@dataclasses.dataclass(frozen=True, kw_only=True)
class HandedOver:
    """What the loss and the intermediate losses get of one micro-batch.

    `logits` is what the student's last stage needs, None on the others; `states` are those of the terms that are
    compared on this stage.
    """

    logits: TeacherStates | TopK | None = None
    states: TeacherParts = dataclasses.field(default_factory=dict)


class TeacherSource(Protocol):
    """A teacher that runs, or one on disk."""

    stopwatch: Stopwatch

    @property
    def runs_ahead(self) -> bool:
        """Whether it runs the micro-batches of a step before the student's schedule starts."""

    @property
    def knows_any_text(self) -> bool:
        """Whether it has an answer for any batch, not for the training samples alone."""

    def prepare(self, batches: list[Batch]) -> None:
        """Before the student's schedule, with its micro-batches, where `runs_ahead`; every rank must call this."""

    def hand_over(self, batch: Batch) -> HandedOver:
        """On every stage, once for each micro-batch, in order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """How a teacher is kept: `precision` is 32, bf16 or fp8 (bf16 weights, fp8 GEMMs of Transformer Engine).

    `layout` None: the student's. `offload_weights` keeps its weights in host memory between steps, `offload_states`
    what it hands over until the student needs it.
    """

    layout: Layout | None = None
    precision: str = "32"
    offload_weights: bool = False
    offload_states: bool = False


class Teacher:
    """This rank's shard of the frozen teacher.

    With one pipeline stage, in the student's layout, it runs when a micro-batch asks for it. Otherwise a stage inside
    the student's schedule cannot wait for other ranks' teacher, so `prepare` runs the micro-batches of the step
    through a forward-only pass of the teacher first and sends what it found to where the student needs it.
    """

    def __init__(self, arch: ArchSpec, path: Path, layout: Layout, *, placement: Placement | None = None,
                 terms: Sequence[Term] = (), student_layers: int = 0, top_k: int | None = None,
                 chunk_tokens: int = 256, timeout_s: int = 600) -> None:
        """Read this rank's slices of the checkpoint in `path`; every rank must call this.

        Args:
            arch: the teacher's.
            path: Hugging Face directory.
            layout: the student's, whose groups are formed.
            placement: its own layout, precision and memory; None: as the student, in fp32.
            terms: intermediate states to hand over, to a student of `student_layers` layers.
            student_layers: layers of the student; not needed without terms.
            top_k: hand over its likeliest tokens instead, worked out `chunk_tokens` tokens at a time.
            chunk_tokens: tokens whose logits exist at a time.
            timeout_s: bound of a collective among the teacher's own groups, seconds.
        """
        self.arch, self.student_layout = arch, layout
        self.placement = placement or Placement()
        self.layout = self.placement.layout or layout
        self.top_k, self.chunk_tokens = top_k, chunk_tokens
        self.stopwatch = Stopwatch()
        self._same_layout = self.layout == layout
        self._beside = None if self._same_layout else GroupsBeside(self.layout, timeout_s=timeout_s)
        self.terms = tuple(terms)
        self._places: dict[Hashable, tuple[int, int]] = {
            (index, part): (stage_of(term.state, term.teacher_layer, self.layout, arch.num_layers),
                            stage_of(term.state, term.student_layer, layout, student_layers))
            for index, term in enumerate(self.terms) for part in range(term.num_parts)}
        self._recorded: dict[Hashable, list[torch.Tensor]] = {}
        self._prepared: list[dict[Hashable, torch.Tensor]] = []
        with self._groups():
            config = transformer_config(arch, self.layout, bf16=self.placement.precision != "32",
                                        fp8=self.placement.precision == "fp8")
            self.model = build_model(arch, config, unfused_norms=any(term.needs_norms for term in self.terms))
            if not self._same_layout and self.model.post_process:
                del self.model.output_layer  # the head is the student's last stage's, below
            self.model.requires_grad_(False)
            self.model.eval()
        self.load_weights(path)
        with self._groups():  # a tap asks which layers are on this stage
            for index, term in enumerate(self.terms):
                tap(self.model, term.state, term.teacher_layer, partial(self._record, index))

    @property
    def knows_any_text(self) -> bool:
        """A model does."""
        return True

    @property
    def runs_ahead(self) -> bool:
        """Whether it must run before the student's schedule."""
        return not self._same_layout or self.layout.pp > 1 or self.placement.offload_weights

    def load_weights(self, path: Path) -> None:
        """Read the weights of another checkpoint of the same architecture; every rank must call this."""
        with self._groups():
            read_weights(self.model, path, self.layout)
        self._head: torch.Tensor | None = None
        if groups.is_last_stage():
            if self._same_layout and not self.placement.offload_weights:
                self._head = self.model.head()
            else:
                self._head = self._read_head(path)
        self._host = [_on_host(parameter.data) for parameter in self.model.parameters()] \
            if self.placement.offload_weights else []
        for parameter, host in zip(self.model.parameters() if self._host else (), self._host, strict=True):
            parameter.data = host

    def _read_head(self, path: Path) -> torch.Tensor:
        """The head's rows `[v, Ht]` in the student's tensor-parallel layout, which is another than the model's."""
        read, send = groups.sharing(self.student_layout)
        tp = self.student_layout.tp
        if read:
            rows = read_head(path, self.arch, tp_rank=groups.tp_rank(), tp_size=tp)
        else:
            rows = torch.empty(padded_vocab_size(self.arch.vocab_size, tp) // tp, self.arch.hidden_size)
        rows = rows.to(device(), self.model.config.params_dtype).contiguous()
        if send is not None:
            send(rows)
        return rows

    @property
    def head(self) -> torch.Tensor:
        """LM head rows of this TP rank of the student, `[v, Ht]` (last stage only)."""
        assert self._head is not None
        return self._head

    def prepare(self, batches: list[Batch]) -> None:
        """Run the micro-batches of the next step, where `runs_ahead`; `hand_over` then gives them out in order.

        Args:
            batches: those of this rank's replica of the student, equally many on every replica.
        """
        if not self.runs_ahead or not batches:
            return
        assert not self._prepared, "the last step's states were not all taken"
        with self.stopwatch:
            size = len(batches)
            everyone = batches if self._same_layout else gather_batches(batches)
            first = groups.dp_rank() * size if self._same_layout else 0
            with self._groups(), self._weights_on_device():
                mine = share(self.student_layout.dp * size, self.layout, groups.dp_rank())
                finals = forward_only(self.model, [everyone[max(number, 0) - first] for number in mine],
                                      num_microbatches=len(mine), consume=lambda hidden, batch: self._whole(hidden))
                found = {(item, number): state for item, states in (self._recorded | {FINAL: finals}).items()
                         for number, state in zip(mine, states, strict=False)}  # no final ones before the last stage
                self._recorded.clear()
            self._prepared = self._deliver(found, batches)

    def hand_over(self, batch: Batch) -> HandedOver:
        """What the student's stage on this rank needs of `batch`, without gradient."""
        if self.runs_ahead:
            states = self._prepared.pop(0)
            if self.placement.offload_states:
                states = {item: value.to(device(), non_blocking=True) for item, value in states.items()}
        else:
            with torch.no_grad(), self.stopwatch:
                states = {FINAL: self._whole(forward_batch(self.model, batch))}
                states |= {item: values[0] for item, values in self._recorded.items()}
                self._recorded.clear()
        final = states.pop(FINAL, None)
        parts: Any = states
        return HandedOver(logits=None if final is None else self._logits(final, batch), states=parts)

    def top_k_of(self, batches: Iterable[Batch], *, num_microbatches: int) -> list[TopK]:
        """The likeliest tokens of each of `batches`, in a pass of its own; nothing on stages before the last."""
        assert self.top_k is not None and self._same_layout
        found = forward_only(self.model, batches, num_microbatches=num_microbatches,
                             consume=lambda hidden, batch: self._logits(self._whole(hidden), batch))
        return [states for states in found if isinstance(states, TopK)]

    def close(self) -> None:
        """End the groups of its own layout; every rank must call this."""
        if self._beside is not None:
            self._beside.end()

    def _groups(self) -> Any:
        return nullcontext() if self._beside is None else self._beside.active()

    def _record(self, index: int, states: States) -> States:
        for part, state in enumerate(states):
            if not self._same_layout:
                if self.terms[index].state == "attention":
                    state = gather_from_tensor_model_parallel_region(state)
                elif self.model.config.sequence_parallel:
                    state = gather_from_sequence_parallel_region(state)
            self._recorded.setdefault((index, part), []).append(state)
        return states

    def _whole(self, hidden: torch.Tensor) -> torch.Tensor:
        return tokens_first(hidden, sequence_parallel=self.model.config.sequence_parallel)

    def _logits(self, hidden: torch.Tensor, batch: Batch) -> TeacherStates | TopK:
        assert groups.is_last_stage()
        if self.top_k is None:
            return TeacherStates(hidden=hidden, head=self.head)
        return teacher_top_k(hidden, self.head, k=self.top_k, labels=batch.labels.t().reshape(-1),
                             loss_mask=batch.loss_mask.t().reshape(-1), chunk_tokens=self.chunk_tokens,
                             vocab_size=self.arch.vocab_size, vocab_start=groups.tp_rank() * self.head.size(0),
                             group=parallel_state.get_tensor_model_parallel_group())

    def _deliver(self, found: dict[tuple[Hashable, int], torch.Tensor],
                 batches: list[Batch]) -> list[dict[Hashable, torch.Tensor]]:
        """Send each state to where the student needs it; this rank's, by micro-batch of its replica."""
        teacher, student = self.layout, self.student_layout
        stages: dict[Hashable, tuple[int, int]] = {FINAL: (teacher.pp - 1, student.pp - 1), **self._places}
        plan = transfers(teacher, student, num_microbatches=len(batches), stages=stages)
        got = deliver(plan, found, {item: self._shape(item, batches[0]) for item in stages},
                      dtype=self.model.config.params_dtype)
        assert dist.get_rank() == rank_of(student, tp=groups.tp_rank(), dp=groups.dp_rank(), pp=groups.pp_rank())
        prepared: list[dict[Hashable, torch.Tensor]] = [{} for _ in batches]
        for (item, number), state in got.items():
            state = state if self._same_layout else self._students_part(item, state)
            prepared[number - groups.dp_rank() * len(batches)][item] = \
                _on_host(state) if self.placement.offload_states else state
        return prepared

    def _shape(self, item: Hashable, batch: Batch) -> tuple[int, ...]:
        """Shape of what travels: with equal layouts this rank's part of a state, else all of it."""
        size, sequence = batch.tokens.shape
        if not isinstance(item, tuple):
            return sequence * size, self.arch.hidden_size
        term, part = self.terms[item[0]], item[1]
        if term.state != "attention":
            shards = self.layout.tp if self._same_layout and self.model.config.sequence_parallel else 1
            return sequence // shards, size, self.arch.hidden_size
        heads = self.arch.num_attention_heads if part == 0 else self.arch.num_query_groups
        return sequence, size, heads * self.arch.head_dim // (self.layout.tp if self._same_layout else 1)

    def _students_part(self, item: Hashable, state: torch.Tensor) -> torch.Tensor:
        """Of a whole state, what this TP rank of the student compares with."""
        if not isinstance(item, tuple):
            return state
        if self.terms[item[0]].state == "attention":
            return state.chunk(groups.tp_size(), dim=2)[groups.tp_rank()]
        parallel = self.student_layout.sequence_parallel and self.student_layout.tp > 1
        return state.chunk(groups.tp_size())[groups.tp_rank()] if parallel else state

    @contextmanager
    def _weights_on_device(self) -> Iterator[None]:
        """Where they are kept in host memory: bring them to the device for the pass."""
        parameters = list(self.model.parameters()) if self._host else []
        for parameter, host in zip(parameters, self._host, strict=True):
            parameter.data = host.to(device(), non_blocking=True)
        try:
            yield
        finally:
            for parameter, host in zip(parameters, self._host, strict=True):
                parameter.data = host


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, pinned where it comes from a GPU."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)
