"""One forward pass over the calibration samples -> `Scores`, at any tensor, pipeline and data parallelism.

Hooks turn each activation into per-sample sequence statistics in fp32 at once; what stays is the sum over
samples of each statistic and of its square, in fp64. Every rank holds sums of its own slices; one all-reduce
over all ranks for each axis at the end puts the slices together. arXiv:2407.14679, section 2.2; where its text and
the official code differ, the measure is a choice and is named in `Scores.measures`.

Shape letters: S sequence (local to this rank under sequence parallelism), B micro-batch, U local units of an
axis, C local channels of all heads, L layers of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_minitron.artifacts import digest_json
from nemo_minitron.data.batch import Batch, Samples
from nemo_minitron.evaluate.loss import padded_batch
from nemo_minitron.importance.scores import BLOCK_INFLUENCE, SEQUENCE_STATISTICS, Scores, width_shape
from nemo_minitron.importance.statistics import head_norms, masked_statistics, sequence_statistics, token_cosines
from nemo_minitron.model.build import HiddenStateGPT
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.cpu import device
from nemo_minitron.parallel.layout import Layout
from nemo_minitron.parallel.schedule import forward_only

Take = Callable[[torch.Tensor], None]

NEURONS = {
    "post_activation": "post-activation: the input of linear_fc2, with a gate act(gate) * up (the official code)",
    "pre_activation": "pre-activation: X W1^T (arXiv:2407.14679, section 2.2), with a gate that of the gate, which the "
                      "activation function sees",
}
HEADS = {
    "channels": "each channel of the heads' outputs over the sequence and the samples, then the L2 norm over a head's "
                "or group's channels (the official code)",
    "tokens": "the L2 norm of each token's output of a head (arXiv:2407.14679, section 2.2) or of a group's heads, "
              "over the sequence and the samples",
}
MEASURES = {
    "hidden": "outputs of the input norm and the pre-MLP norm of every layer, and of the final norm",
    "layers": "block influence: 1 - mean over tokens of cos(layer input, layer output)",
}


def collect_scores(model: HiddenStateGPT, samples: Samples, sample_ids: np.ndarray, *, layout: Layout,
                   micro_batch_size: int, source_digest: str, neurons: str = "post_activation",
                   heads: str = "channels") -> Scores:
    """Measure all axes in one forward pass over `sample_ids`. Every rank must call this and gets the scores.

    Args:
        model: this rank's shard, with norms that are modules of their own (`unfused_norms`).
        samples: the calibration split.
        sample_ids: which samples, int64 `[n]`; replicas take turns at micro-batches of them.
        layout: the layout whose groups are formed.
        micro_batch_size: samples a forward pass.
        source_digest: weights digest of the checkpoint in `model`.
        neurons: what is measured of FFN neurons, a key of `NEURONS`.
        heads: what is measured of heads and groups, a key of `HEADS`.
    """
    collector = _Collector(model, neurons=neurons, heads=heads)
    turns = -(-len(sample_ids) // (micro_batch_size * layout.dp))

    def batches() -> Iterator[Batch]:
        for turn in range(turns):
            first = (turn * layout.dp + groups.dp_rank()) * micro_batch_size
            batch = padded_batch(samples, sample_ids[first : first + micro_batch_size], micro_batch_size).to(device())
            collector.look_at(batch)
            yield batch

    try:
        forward_only(model, batches(), num_microbatches=turns, consume=lambda hidden, batch: None)
    finally:
        collector.remove()
    return Scores(
        source=model.arch, num_samples=len(sample_ids), source_digest=source_digest,
        measures={**MEASURES, "ffn": NEURONS[neurons], "heads": HEADS[heads], "groups": HEADS[heads]},
        samples_digest=digest_json({"ids": sample_ids.tolist(), "seq_length": samples.seq_length}),
        tensors=collector.reduce(),
    )


class _Collector:
    """The hooks on one shard and the sums they fill."""

    def __init__(self, model: HiddenStateGPT, *, neurons: str, heads: str) -> None:
        self.arch = model.arch
        self.sequence_parallel = model.config.sequence_parallel
        self._counted_B = torch.ones(0, dtype=torch.float64)
        self._real_SB: torch.Tensor | None = None
        self._sums: dict[tuple[str, int], torch.Tensor] = {}
        self._cosine = torch.zeros(model.arch.num_layers, 2, dtype=torch.float64, device=device())
        self._handles: list[Any] = []
        self._gated = model.config.gated_linear_unit
        self._axes = ["hidden", "ffn", *(["head_channels"] if heads == "channels" else ["heads", "groups"])]
        for local, layer in enumerate(model.decoder.layers):
            index = model.layer_offset + local
            self._after(layer.input_layernorm, self._norm(2 * index))
            self._after(layer.pre_mlp_layernorm, self._norm(2 * index + 1))
            if neurons == "pre_activation":
                self._after(layer.mlp.linear_fc1, self._fc1(index))
            else:
                self._before(layer.mlp.linear_fc2, partial(self._add, "ffn", index))
            self._before(layer.self_attention.linear_proj, self._heads(index))
            self._handles.append(layer.register_forward_hook(self._block_influence(index), with_kwargs=True))
        if model.post_process:
            self._after(model.decoder.final_layernorm, self._norm(2 * model.arch.num_layers))

    def look_at(self, batch: Batch) -> None:
        """What counts of the micro-batch that comes next: no row without a label, no token outside of documents."""
        self._counted_B = (batch.loss_mask.sum(1) > 0).double()
        self._real_SB = None if batch.document_ids is None else batch.document_ids.t() > 0

    def _real(self, num_tokens: int) -> torch.Tensor | None:
        """Which of the tokens of an activation are in documents, `[S, B]`; of this rank's part where it has only one.

        None: all.
        """
        if self._real_SB is None or num_tokens == self._real_SB.size(0):
            return self._real_SB
        return self._real_SB.narrow(0, groups.tp_rank() * num_tokens, num_tokens)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _after(self, module: torch.nn.Module, take: Take) -> None:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            take(output[0] if isinstance(output, tuple) else output)

        self._handles.append(module.register_forward_hook(hook))

    def _before(self, module: torch.nn.Module, take: Take) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda module, args: take(args[0])))

    def _norm(self, row: int) -> Take:
        group = parallel_state.get_tensor_model_parallel_group() if self.sequence_parallel else None
        return lambda value: self._add("hidden", row, value, token_group=group)

    def _fc1(self, row: int) -> Take:
        return lambda value: self._add("ffn", row, value.chunk(2, dim=-1)[0] if self._gated else value)

    def _heads(self, row: int) -> Take:
        def take(context_SBC: torch.Tensor) -> None:
            if "head_channels" in self._axes:
                return self._add("head_channels", row, context_SBC)
            head_dim = self.arch.head_dim
            for axis, size in (("heads", head_dim), ("groups", self.arch.heads_per_group * head_dim)):
                norms = head_norms(context_SBC, heads=context_SBC.size(-1) // size, dim=size)
                self._add(axis, row, norms)

        return take

    def _block_influence(self, index: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            cosine_SB = token_cosines(args[0] if args else kwargs["hidden_states"], output[0])
            real_SB = self._real(cosine_SB.size(0))
            if real_SB is not None:
                counted_SB = real_SB * self._counted_B
                self._cosine[index] += torch.stack([(cosine_SB * counted_SB).sum(), counted_SB.sum()])
                return
            self._cosine[index, 0] += (cosine_SB * self._counted_B).sum()
            self._cosine[index, 1] += cosine_SB.size(0) * self._counted_B.sum()

        return hook

    def _add(self, axis: str, row: int, activation_SBU: torch.Tensor, *,
             token_group: dist.ProcessGroup | None = None) -> None:
        real_SB = self._real(activation_SBU.size(0))
        statistics = (sequence_statistics(activation_SBU, token_group=token_group) if real_SB is None else
                      masked_statistics(activation_SBU, real_SB, token_group=token_group)).double()
        counted = self._counted_B.view(1, -1, 1)
        moments = torch.stack([(statistics * counted).sum(1), (statistics.square() * counted).sum(1)])
        key = (axis, row)
        self._sums[key] = self._sums[key] + moments if key in self._sums else moments

    def reduce(self) -> dict[str, np.ndarray]:
        """Put the slices of all ranks together: one all-reduce over all ranks for each axis and one for the cosines.

        Of values that all ranks of a TP group hold, rank 0's are counted.
        """
        tensors: dict[str, np.ndarray] = {}
        tp_rank = groups.tp_rank()
        for axis in self._axes:
            rows, size = width_shape(self.arch, axis)
            sharded = axis != "hidden"
            whole = torch.zeros(2, len(SEQUENCE_STATISTICS), rows, size, dtype=torch.float64, device=device())
            for (key_axis, row), moments in self._sums.items():
                if key_axis == axis and (sharded or tp_rank == 0):
                    first = tp_rank * moments.size(-1) if sharded else 0
                    whole[:, :, row, first : first + moments.size(-1)] = moments
            dist.all_reduce(whole)
            for number, statistic in enumerate(SEQUENCE_STATISTICS):
                tensors[f"{axis}.{statistic}.sum"] = whole[0, number].cpu().numpy()
                tensors[f"{axis}.{statistic}.sum_of_squares"] = whole[1, number].cpu().numpy()
        cosine = self._cosine if self.sequence_parallel or tp_rank == 0 else torch.zeros_like(self._cosine)
        dist.all_reduce(cosine)
        tensors[BLOCK_INFLUENCE] = (1.0 - cosine[:, 0] / cosine[:, 1]).cpu().numpy()
        return tensors
