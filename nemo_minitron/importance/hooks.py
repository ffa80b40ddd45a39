"""One forward pass over the calibration samples -> `Scores`, at any tensor, pipeline and data parallelism.

Hooks turn each activation into per-sample sequence statistics in fp32 at once; what stays is the sum over
samples of each statistic and of its square, in fp64. Every rank holds sums of its own slices; one all-reduce
over all ranks at the end puts the slices together. arXiv:2407.14679, section 2.2; where its text and the
official code differ, the measure is named in `Scores.measures`.

Shape letters: S sequence (local to this rank under sequence parallelism), B micro-batch, U local units of an
axis, L layers of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_minitron.artifacts import digest_json
from nemo_minitron.data.batch import Batch, TokenSamples
from nemo_minitron.evaluate.loss import padded_batch
from nemo_minitron.importance.scores import BLOCK_INFLUENCE, SEQUENCE_STATISTICS, Scores, width_shape
from nemo_minitron.model.build import HiddenStateGPT
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.cpu import device
from nemo_minitron.parallel.layout import Layout
from nemo_minitron.parallel.schedule import forward_only

MEASURES = {
    "ffn": "post-activation: act(gate) * up, the input of linear_fc2 (as the official code; the paper: pre-activation)",
    "hidden": "outputs of the input norm and the pre-MLP norm of every layer, the final norm not included",
    "layers": "block influence: 1 - mean over tokens of cos(layer input, layer output)",
}


def collect_scores(model: HiddenStateGPT, samples: TokenSamples, sample_ids: np.ndarray, *, layout: Layout,
                   micro_batch_size: int, source_digest: str) -> Scores:
    """Measure all axes in one forward pass over `sample_ids`. Every rank must call this and gets the scores.

    Args:
        model: this rank's shard, with norms that are modules of their own (`unfused_norms`).
        samples: the calibration split.
        sample_ids: which samples, int64 `[n]`; replicas take turns at micro-batches of them.
        layout: the layout whose groups are formed.
        micro_batch_size: samples a forward pass.
        source_digest: weights digest of the checkpoint in `model`.
    """
    collector = _Collector(model)
    turns = -(-len(sample_ids) // (micro_batch_size * layout.dp))

    def batches() -> Iterator[Batch]:
        for turn in range(turns):
            first = (turn * layout.dp + groups.dp_rank()) * micro_batch_size
            batch = padded_batch(samples, sample_ids[first : first + micro_batch_size], micro_batch_size).to(device())
            collector.counted_B = (batch.loss_mask.sum(1) > 0).double()
            yield batch

    try:
        forward_only(model, batches(), num_microbatches=turns, consume=lambda hidden, batch: None)
    finally:
        collector.remove()
    return Scores(
        source=model.arch, num_samples=len(sample_ids), source_digest=source_digest, measures=dict(MEASURES),
        samples_digest=digest_json({"ids": sample_ids.tolist(), "seq_length": samples.spec.seq_length}),
        tensors=collector.reduce(),
    )


class _Collector:
    """The hooks on one shard and the sums they fill."""

    def __init__(self, model: HiddenStateGPT) -> None:
        self.arch = model.arch
        self.sequence_parallel = model.config.sequence_parallel
        self.counted_B = torch.ones(0, dtype=torch.float64)
        self._sums: dict[tuple[str, int], torch.Tensor] = {}
        self._cosine = torch.zeros(model.arch.num_layers, 2, dtype=torch.float64, device=device())
        self._handles: list[Any] = []
        for local, layer in enumerate(model.decoder.layers):
            index = model.layer_offset + local
            self._watch(layer.input_layernorm, "hidden", 2 * index)
            self._watch(layer.pre_mlp_layernorm, "hidden", 2 * index + 1)
            self._handles.append(layer.mlp.linear_fc2.register_forward_pre_hook(self._before_fc2(index)))
            self._handles.append(layer.register_forward_hook(self._after_layer(index), with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _watch(self, norm: torch.nn.Module, axis: str, row: int) -> None:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            self._add(axis, row, output, sharded_tokens=self.sequence_parallel)

        self._handles.append(norm.register_forward_hook(hook))

    def _before_fc2(self, index: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._add("ffn", index, args[0], sharded_tokens=False)

        return hook

    def _after_layer(self, index: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = (args[0] if args else kwargs["hidden_states"]).float()
            cosine_SB = torch.nn.functional.cosine_similarity(before, output[0].float(), dim=-1).double()
            self._cosine[index, 0] += (cosine_SB * self.counted_B).sum()
            self._cosine[index, 1] += cosine_SB.size(0) * self.counted_B.sum()

        return hook

    def _add(self, axis: str, row: int, activation_SBU: torch.Tensor, *, sharded_tokens: bool) -> None:
        statistics = sequence_statistics(activation_SBU, sharded_tokens=sharded_tokens).double()
        counted = self.counted_B.view(1, -1, 1)
        moments = torch.stack([(statistics * counted).sum(1), (statistics.square() * counted).sum(1)])
        key = (axis, row)
        self._sums[key] = self._sums[key] + moments if key in self._sums else moments

    def reduce(self) -> dict[str, np.ndarray]:
        """Put the slices of all ranks together: one all-reduce over all ranks for each axis and one for the cosines.

        Of values that all ranks of a TP group hold, rank 0's are counted.
        """
        tensors: dict[str, np.ndarray] = {}
        tp_rank = groups.tp_rank()
        for axis in ("hidden", "ffn"):
            rows, size = width_shape(self.arch, axis)
            whole = torch.zeros(2, len(SEQUENCE_STATISTICS), rows, size, dtype=torch.float64, device=device())
            for (key_axis, row), moments in self._sums.items():
                if key_axis == axis and (axis == "ffn" or tp_rank == 0):
                    first = tp_rank * moments.size(-1) if axis == "ffn" else 0
                    whole[:, :, row, first : first + moments.size(-1)] = moments
            dist.all_reduce(whole)
            for number, statistic in enumerate(SEQUENCE_STATISTICS):
                tensors[f"{axis}.{statistic}.sum"] = whole[0, number].cpu().numpy()
                tensors[f"{axis}.{statistic}.sum_of_squares"] = whole[1, number].cpu().numpy()
        cosine = self._cosine if self.sequence_parallel or tp_rank == 0 else torch.zeros_like(self._cosine)
        dist.all_reduce(cosine)
        tensors[BLOCK_INFLUENCE] = (1.0 - cosine[:, 0] / cosine[:, 1]).cpu().numpy()
        return tensors


def sequence_statistics(activation_SBU: torch.Tensor, *, sharded_tokens: bool) -> torch.Tensor:
    """Mean of absolute values, L2 norm and variance over the sequence, fp32 (fp64 for fp64) `[3, B, U]`.

    With `sharded_tokens` the sequence is spread evenly over the TP group: two all-reduces, and variances
    merged by Chan's formula, `M2 = sum_i M2_i + sum_i n_i (mean_i - mean)^2` (Chan, Golub, LeVeque 1979).
    """
    activation = activation_SBU if activation_SBU.dtype == torch.float64 else activation_SBU.float()
    count = activation.size(0)
    absolute, squares, mean = activation.abs().sum(0), activation.square().sum(0), activation.mean(0)
    m2 = (activation - mean).square_().sum(0)
    if sharded_tokens:
        group = parallel_state.get_tensor_model_parallel_group()
        shards = dist.get_world_size(group)
        packed = torch.stack([absolute, squares, mean])
        dist.all_reduce(packed, group=group)
        absolute, squares, merged = packed[0], packed[1], packed[2] / shards
        m2 = m2 + count * (mean - merged).square()
        dist.all_reduce(m2, group=group)
        count *= shards
    return torch.stack([absolute / count, squares.sqrt(), m2 / count])
