"""How long a step takes: rooflines of matrix products, attention and elementwise work, communication, pipeline bubble.

A matrix product takes the longer of its arithmetic at the GPU's reachable rate and of moving its three matrices through
memory; elementwise work moves its tensors; a collective takes its bytes over the slowest link on its way plus a
latency. Nothing overlaps: Megatron's overlaps are off in `training/strategy.py`. Unlike `flops`, attention here is
causal: half of the positions.

Letters: T tokens of a micro-batch, S sequence, H hidden, F ffn, N heads, G query groups, D head_dim, v head rows.
"""

from __future__ import annotations

import dataclasses
import math

from nemo_minitron.arch import ArchSpec
from nemo_minitron.cost.hardware import BANDWIDTH_EFFICIENCY, COLLECTIVE_LATENCY_S, Gpu
from nemo_minitron.cost.memory import Step
from nemo_minitron.cost.shards import head_rows, stage_tensors
from nemo_minitron.parallel.layout import Layout

PARTS = ("matmul", "attention", "elementwise", "tensor_parallel", "loss", "teacher", "pipeline", "data_parallel",
         "optimizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seconds:
    """A step's seconds by part. `pipeline`: bubbles and what stages send to each other."""

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    tensor_parallel: float = 0.0
    loss: float = 0.0
    teacher: float = 0.0
    pipeline: float = 0.0
    data_parallel: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(getattr(self, part) for part in PARTS)

    def times(self, factor: float) -> Seconds:
        """Every part, `factor` times."""
        return Seconds(**{part: factor * getattr(self, part) for part in PARTS})

    def plus(self, other: Seconds) -> Seconds:
        """The sum, part by part."""
        return Seconds(**{part: getattr(self, part) + getattr(other, part) for part in PARTS})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """A GPU under a layout and a precision: what its products, transfers and collectives take, in seconds."""

    gpu: Gpu
    layout: Layout
    bf16: bool

    def matmul(self, m: float, k: float, n: float) -> float:
        """`[m, k] x [k, n]`."""
        peak = self.gpu.peak(bf16=self.bf16)
        arithmetic = 2 * m * k * n / (peak * self.gpu.matmul_efficiency)
        return max(arithmetic, self.memory((m * k + k * n + m * n) * (2 if self.bf16 else 4)))

    def attention(self, *, samples: float, seq_length: int, width: float) -> float:
        """Fused causal attention of heads that are `width` = heads * head_dim wide together."""
        peak = self.gpu.peak(bf16=self.bf16)
        return 2 * samples * seq_length**2 * width / (peak * self.gpu.attention_efficiency)

    def memory(self, num_bytes: float) -> float:
        """Reading and writing `num_bytes` of the GPU's memory."""
        return num_bytes / (self.gpu.memory_bandwidth * BANDWIDTH_EFFICIENCY)

    def _link(self, ranks: int, stride: int) -> tuple[float, str]:
        """Bandwidth of a ring of `ranks` GPUs `stride` apart, and its kind.

        Those of a node that are in one ring use all of their network cards for it.
        """
        inside = max(1, self.gpu.gpus_per_node // stride)
        if ranks <= inside:
            return self.gpu.link_bandwidth, "link"
        return min(self.gpu.link_bandwidth, inside * self.gpu.network_bandwidth), "network"

    def all_reduce(self, num_bytes: float, ranks: int, *, stride: int = 1, passes: float = 2.0) -> float:
        """A ring all-reduce; with `passes` = 1 an all-gather or a reduce-scatter, half of it."""
        if ranks == 1:
            return 0.0
        bandwidth, kind = self._link(ranks, stride)
        latency = COLLECTIVE_LATENCY_S[kind] * max(1.0, math.log2(ranks / self.gpu.gpus_per_node))
        return passes * (ranks - 1) / ranks * num_bytes / (bandwidth * BANDWIDTH_EFFICIENCY) + latency

    def send(self, num_bytes: float) -> float:
        """To the next pipeline stage, `tp * dp` ranks away."""
        inside = self.layout.world_size <= self.gpu.gpus_per_node
        bandwidth = self.gpu.link_bandwidth if inside else self.gpu.network_bandwidth
        return num_bytes / (bandwidth * BANDWIDTH_EFFICIENCY) + COLLECTIVE_LATENCY_S["link" if inside else "network"]


def layer_seconds(machine: Machine, arch: ArchSpec, *, samples: float, seq_length: int, backward: bool) -> Seconds:
    """Forward of a layer on a micro-batch, and backward if asked.

    Backward: two products for each of the forward's; attention 2.5 times the forward's (it is recomputed); twice the
    elementwise traffic; the collectives again, with sequence parallelism half as many more to gather inputs anew.
    """
    tp, item = machine.layout.tp, 2 if machine.bf16 else 4
    tokens, hidden, dim = samples * seq_length, arch.hidden_size, arch.head_dim
    heads, groups, ffn = (size / tp for size in (arch.num_attention_heads, arch.num_query_groups, arch.ffn_hidden_size))
    first = (arch.num_mlp_matrices - 1) * ffn
    shapes = [(hidden, (heads + 2 * groups) * dim), (heads * dim, hidden), (hidden, first), (ffn, hidden)]
    matmul = sum(machine.matmul(tokens, k, n) for k, n in shapes)
    if backward:  # by the input, [T, n] x [n, k], and by the weight, [k, T] x [T, n]
        matmul += sum(machine.matmul(tokens, n, k) + machine.matmul(k, tokens, n) for k, n in shapes)
    attention = machine.attention(samples=samples, seq_length=seq_length, width=heads * dim)
    # two norms read and write, two additions read two and write one; rotation and activation read and write
    stream = 10 * hidden / (tp if machine.layout.sequence_parallel else 1)
    elementwise = machine.memory(tokens * item * (stream + 2 * (heads + groups) * dim + first + ffn))
    collective = 2 * machine.all_reduce(tokens * hidden * item, tp)
    again = (1.5 if machine.layout.sequence_parallel else 1.0) if backward else 0.0
    return Seconds(matmul=matmul, attention=attention * (3.5 if backward else 1.0),
                   elementwise=elementwise * (3.0 if backward else 1.0), tensor_parallel=collective * (1 + again))


def loss_seconds(machine: Machine, student: ArchSpec, teacher: ArchSpec | None, step: Step) -> float:
    """The LM heads and the loss of a micro-batch.

    Products of both models and the student's two gradients; of each chunk the head's fp32 gradient read and written,
    six passes over the logits of either side, and two collectives of a few numbers a token (`distill/fused_kl.py`).
    """
    tokens, rows, tp = step.micro_tokens, head_rows(student, machine.layout.tp), machine.layout.tp
    chunks, chunk = math.ceil(tokens / step.chunk_tokens), min(step.chunk_tokens, tokens)
    hidden = student.hidden_size
    seconds = chunks * (machine.matmul(chunk, hidden, rows) + machine.matmul(chunk, rows, hidden)
                        + machine.matmul(rows, chunk, hidden))
    seconds += chunks * machine.memory(2 * rows * hidden * 4)
    sides = 1
    if teacher is not None:
        sides = 2
        seconds += chunks * machine.matmul(chunk, teacher.hidden_size, rows)
    seconds += machine.memory(6 * sides * tokens * rows * 4)
    seconds += 2 * chunks * machine.all_reduce(8 * sides * chunk * 4, tp)
    return seconds + machine.all_reduce(tokens * hidden * step.itemsize, tp)


def forward_seconds(machine: Machine, arch: ArchSpec, step: Step) -> float:
    """A forward pass over a replica's share of a step, through the whole pipeline, without the LM head."""
    layer = layer_seconds(machine, arch, samples=step.micro_batch_size, seq_length=step.seq_length, backward=False)
    stages = [layers * layer.total for layers in machine.layout.stage_layers(arch.num_layers)]
    micro = step.num_microbatches(machine.layout.dp)
    return sum(stages) + (micro - 1) * max(stages) + _sends(machine, arch, step, 1)


def step_seconds(student: ArchSpec, layout: Layout, step: Step, gpu: Gpu, *,
                 teacher: ArchSpec | None = None) -> Seconds:
    """A training step; with a teacher its forward, inside the step or, with several stages, in a pass before it."""
    machine = Machine(gpu=gpu, layout=layout, bf16=step.bf16)
    micro = step.num_microbatches(layout.dp)
    layer = layer_seconds(machine, student, samples=step.micro_batch_size, seq_length=step.seq_length, backward=True)
    loss = loss_seconds(machine, student, teacher, step)
    layers = layout.stage_layers(student.num_layers)
    stages = [count * layer.total + (loss if stage == layout.pp - 1 else 0.0) for stage, count in enumerate(layers)]
    slowest = max(range(layout.pp), key=stages.__getitem__)
    busy = layer.times(layers[slowest]).plus(Seconds(loss=loss if slowest == layout.pp - 1 else 0.0)).times(micro)
    bubble = sum(stages) - stages[slowest]
    return busy.plus(Seconds(
        teacher=forward_seconds(machine, teacher, step) if teacher else 0.0,
        pipeline=bubble + _sends(machine, student, step, 2),
        data_parallel=_reduce_gradients(machine, student, step),
        optimizer=_optimizer(machine, student, step),
    ))


def _sends(machine: Machine, arch: ArchSpec, step: Step, directions: int) -> float:
    """What one stage sends and waits for in a step: a micro-batch's residual stream each time."""
    layout = machine.layout
    if layout.pp == 1:
        return 0.0
    num_bytes = step.micro_tokens * arch.hidden_size * step.itemsize / (layout.tp if layout.sequence_parallel else 1)
    return directions * step.num_microbatches(layout.dp) * machine.send(num_bytes)


def _largest_stage(arch: ArchSpec, layout: Layout) -> int:
    return max(sum(stage_tensors(arch, layout, stage)) for stage in range(layout.pp))


def _reduce_gradients(machine: Machine, arch: ArchSpec, step: Step) -> float:
    """fp32 gradients over the replicas; the distributed optimizer scatters them and gathers weights instead."""
    layout, elements = machine.layout, _largest_stage(arch, machine.layout)
    if not step.distributed_optimizer:
        return machine.all_reduce(elements * 4, layout.dp, stride=layout.tp)
    return (machine.all_reduce(elements * 4, layout.dp, stride=layout.tp, passes=1)
            + machine.all_reduce(elements * step.itemsize, layout.dp, stride=layout.tp, passes=1))


def _optimizer(machine: Machine, arch: ArchSpec, step: Step) -> float:
    """Memory traffic a parameter: the gradient set to zero, read for its norm and for Adam; weight and moments read and
    written in fp32; with bf16 the weight written once more.
    """
    elements = _largest_stage(arch, machine.layout) / (machine.layout.dp if step.distributed_optimizer else 1)
    return machine.memory(elements * (12 + 24 + (2 if step.bf16 else 0)))
