"""Bytes on a GPU while a stage trains or runs forward, by kind, for the choices that this project's code makes.

Weights, gradients and optimizer states follow Megatron's (`training/strategy.py`, `training/trainer.py`): gradients in
one fp32 buffer; Adam with two fp32 moments, and with bf16 an fp32 copy of the weights, both sharded over data
parallelism by the distributed optimizer. The teacher has the student's layout and precision (`distill/teacher.py`).
Activations are counted tensor by tensor in the manner of arXiv:2205.05198, section 4, for what a backward pass needs
with Transformer Engine's fused attention, norms and SwiGLU, without dropout and without recomputation.

Letters: T tokens of a micro-batch, H hidden, F ffn, N heads, G query groups, D head_dim, v LM head rows on a rank.
"""

from __future__ import annotations

import dataclasses
import math

from nemo_minitron.arch import ArchSpec
from nemo_minitron.cost.hardware import OVERHEAD_BYTES
from nemo_minitron.cost.shards import buffer_elements, head_rows, stage_tensors
from nemo_minitron.parallel.layout import Layout

KINDS = ("weights", "gradients", "optimizer", "teacher", "activations", "loss", "overhead")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """The shape of a training step. `bf16`: bf16-mixed precision, else all in fp32."""

    seq_length: int
    global_batch_size: int
    micro_batch_size: int
    bf16: bool
    distributed_optimizer: bool = False
    chunk_tokens: int = 256
    simple_loss: bool = True
    """Forward KL and cross-entropy at temperature 1, which need less memory than the other losses."""

    @property
    def itemsize(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bf16 else 4

    @property
    def micro_tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.seq_length

    def num_microbatches(self, dp: int) -> int:
        """Micro-batches of a replica's step."""
        return math.ceil(self.global_batch_size / (self.micro_batch_size * dp))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by kind on a rank of the pipeline stage `stage`."""

    stage: int
    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    teacher: float = 0.0
    activations: float = 0.0
    loss: float = 0.0
    overhead: float = OVERHEAD_BYTES

    @property
    def total(self) -> float:
        """All kinds together."""
        return sum(getattr(self, kind) for kind in KINDS)


def weight_bytes(arch: ArchSpec, layout: Layout, stage: int, *, itemsize: int) -> int:
    """Of the parameters on a rank of `stage`."""
    return sum(stage_tensors(arch, layout, stage)) * itemsize


def training_memory(student: ArchSpec, layout: Layout, step: Step, *, teacher: ArchSpec | None = None) -> Memory:
    """The fullest pipeline stage's memory while `student` trains, with a streamed `teacher` if there is one."""
    stages = [_training_stage(student, layout, step, stage, teacher) for stage in range(layout.pp)]
    return max(stages, key=lambda memory: memory.total)


def forward_memory(arch: ArchSpec, layout: Layout, *, tokens: int, itemsize: int) -> Memory:
    """The same while a model of `itemsize` bytes a weight runs forward on `tokens` tokens at a time."""
    stages = [Memory(stage=stage, weights=weight_bytes(arch, layout, stage, itemsize=itemsize),
                     activations=_working_set(arch, layout, tokens) * itemsize) for stage in range(layout.pp)]
    return max(stages, key=lambda memory: memory.total)


def _training_stage(student: ArchSpec, layout: Layout, step: Step, stage: int, teacher: ArchSpec | None) -> Memory:
    tensors = stage_tensors(student, layout, stage)
    elements = buffer_elements(tensors, dp=layout.dp, distributed_optimizer=step.distributed_optimizer)
    shards = layout.dp if step.distributed_optimizer else 1
    last = stage == layout.pp - 1
    held = elements if step.distributed_optimizer else sum(tensors)
    saved = _saved(student, layout, step, stage)
    working = _working_set(student, layout, step.micro_tokens) + max(tensors) + (
        _working_set(teacher, layout, step.micro_tokens) if teacher and layout.pp == 1 else 0)
    return Memory(
        stage=stage,
        weights=held * step.itemsize,
        gradients=elements * 4,
        optimizer=elements / shards * (12 if step.bf16 else 8),
        teacher=_teacher(teacher, layout, step, stage) if teacher else 0,
        activations=(saved + working) * step.itemsize,
        loss=_loss(student, teacher, layout, step) if last else 0,
    )


def layer_activations(arch: ArchSpec, layout: Layout, tokens: int) -> float:
    """Elements of a layer that its backward pass needs.

    On the residual stream two norms' inputs and outputs, 4 * T * H (sharded by sequence parallelism); of attention
    the query, key and value projections' output, rotated queries and keys, and the output, T * D * (3 N + 3 G) / tp;
    of the MLP the first product and the activation: 3 * T * F / tp for SwiGLU, and the rectified and the squared
    values, 2 * T * F / tp, for squared ReLU.
    """
    residual = 4 * tokens * arch.hidden_size / (layout.tp if layout.sequence_parallel else 1)
    attention = tokens * arch.head_dim * 3 * (arch.num_attention_heads + arch.num_query_groups) / layout.tp
    mlp = tokens * arch.ffn_hidden_size * (3 if arch.activation == "swiglu" else 2) / layout.tp
    return residual + attention + mlp


def _saved(arch: ArchSpec, layout: Layout, step: Step, stage: int) -> float:
    """Elements saved for the backward passes of all micro-batches in flight: pp - stage of them with 1F1B."""
    in_flight = min(layout.pp - stage, step.num_microbatches(layout.dp))
    layers = layout.stage_layers(arch.num_layers)[stage]
    return in_flight * layers * layer_activations(arch, layout, step.micro_tokens)


def _working_set(arch: ArchSpec, layout: Layout, tokens: int) -> float:
    """Elements that come and go within a layer: two states of the residual stream (gathered for the products where
    sequence parallelism shards them), the wider of the MLP's first product and the projections, and its gradient.
    """
    wide = max((arch.num_mlp_matrices - 1) * arch.ffn_hidden_size,
               (arch.num_attention_heads + 2 * arch.num_query_groups) * arch.head_dim)
    return tokens * (2 * arch.hidden_size + 2 * wide / layout.tp)


def _teacher(teacher: ArchSpec, layout: Layout, step: Step, stage: int) -> float:
    """Its weights; with several stages also, on the last one, its final states of all micro-batches of a step."""
    held = weight_bytes(teacher, layout, stage, itemsize=step.itemsize)
    if layout.pp > 1 and stage == layout.pp - 1:
        held += step.num_microbatches(layout.dp) * step.micro_tokens * teacher.hidden_size * step.itemsize
    return held


def _loss(student: ArchSpec, teacher: ArchSpec | None, layout: Layout, step: Step) -> float:
    """Of `distill/fused_kl.py`: chunks of fp32 logits, fp32 gradients of the head and the states and their copies in
    the weights' precision, and both models' final states, gathered over tensor parallelism.
    """
    tokens, rows, hidden = step.micro_tokens, head_rows(student, layout.tp), student.hidden_size
    chunks = (2.25 if teacher else 1.25) if step.simple_loss else 4.0
    chunks += 0.5 if step.bf16 else 0.0  # the rounded gradient of the logits
    logits = chunks * min(step.chunk_tokens, tokens) * rows * 4
    gradients = (rows + tokens) * hidden * (4 + (2 if step.bf16 else 0))
    states = tokens * (hidden + (teacher.hidden_size if teacher else 0)) * step.itemsize
    return logits + gradients + states
