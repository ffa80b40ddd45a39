"""The Lightning module that trains one Megatron shard by cross-entropy; distillation extends its step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning.megatron_parallel import MegatronLossReduction

from nemo_minitron.arch import ArchSpec
from nemo_minitron.data.batch import Batch, Samples
from nemo_minitron.distill.terms import METERS, LossTerms, loss_terms
from nemo_minitron.evaluate.loss import heldout_sums
from nemo_minitron.launch import standing
from nemo_minitron.model.build import HiddenStateGPT, load_model, transformer_config
from nemo_minitron.model.forward import forward_batch
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.cpu import device
from nemo_minitron.parallel.layout import Layout
from nemo_minitron.training.throughput import flops_per_token


class TrainingModule(pl.LightningModule):
    """Trains the Hugging Face checkpoint in `checkpoint`; `training_step` is the whole of it.

    NeMo calls `training_step` on the last pipeline stage and `forward_step` on the others, both inside
    Megatron's schedule, once per micro-batch.
    """

    def __init__(self, *, arch: ArchSpec, checkpoint: Path, layout: Layout, chunk_tokens: int, bf16: bool,
                 recompute: str = "none", unfused_norms: bool = False) -> None:
        """Describe the model; `configure_model` builds it once the trainer has joined the process groups."""
        super().__init__()
        self.arch = arch
        self.checkpoint = checkpoint
        self.chunk_tokens = chunk_tokens
        self.layout = layout
        self.unfused_norms = unfused_norms
        self.config = transformer_config(arch, layout, bf16=bf16, recompute=recompute)
        self.seq_length = 0  # of the last batch
        self.step_sums = torch.zeros(len(METERS), dtype=torch.float64)
        self._reduction = SumReduction(self)

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Build this rank's shard and read its weights (called by NeMo's strategy)."""
        if not hasattr(self, "module"):
            self.module = load_model(self.arch, self.checkpoint, self.config, layout=self.layout,
                                     unfused_norms=self.unfused_norms)

    def training_step(self, batch: Batch, batch_idx: int | None = None) -> LossTerms:
        """Forward and loss of one micro-batch on the last pipeline stage."""
        return self.loss(self.forward_step(batch), batch)

    def forward_step(self, batch: Batch) -> torch.Tensor:
        """Forward of one micro-batch on any stage: the hidden state handed on, `[S, B, H]`."""
        return forward_batch(self.module, batch)

    def loss(self, hidden: torch.Tensor, batch: Batch) -> LossTerms:
        """The loss of one micro-batch from its final hidden state (last stage)."""
        return loss_terms(self.student, hidden, batch, chunk_tokens=self.chunk_tokens)

    def measure(self, samples: Samples, *, micro_batch_size: int, max_samples: int | None = None) -> dict[str, float]:
        """Means on held-out data of what the meters show in training; every rank must call this.

        Losses in nats/token over all predicted tokens of `samples`, or of `max_samples` spread evenly over them.
        """
        sums = heldout_sums(
            self.student, samples, layout=self.layout, micro_batch_size=micro_batch_size, max_samples=max_samples,
            sums_of=lambda hidden, batch: loss_terms(self.student, hidden, batch, chunk_tokens=self.chunk_tokens).sums)
        return means_of(sums, ("ce",))

    def data_step(self, data: Iterator[Any]) -> Batch:
        """The next micro-batch; Lightning's fetcher adds indices that are not needed."""
        item = next(data)
        standing.alive()
        batch: Batch = item[0] if isinstance(item, tuple) else item
        self.seq_length = batch.tokens.size(1)
        return batch

    @property
    def meters(self) -> tuple[str, ...]:
        """Which of METERS the step measures; the others are zero and not written down."""
        return ("loss", "ce", "tokens")

    def before_step(self, batches: list[Batch]) -> None:
        """Called on every rank with the step's micro-batches before its schedule starts, where `needs_batches`."""

    @property
    def needs_batches(self) -> bool:
        """Whether `before_step` wants the micro-batches of a step before its schedule starts."""
        return False

    def finish_step(self, means: dict[str, float]) -> dict[str, float]:
        """Called on every rank with the means of the step just done; returns what the meters show."""
        return means

    def flops_per_token(self) -> float:
        """Model FLOPs of the step just done, per token."""
        return flops_per_token(self.arch, None, self.seq_length)

    def take_teacher_seconds(self) -> float:
        """Seconds that this rank spent on a teacher since the last call."""
        return 0.0

    def sum_gradients(self) -> None:
        """Called on every rank after the step's schedule, before Megatron reduces the gradients."""

    @property
    def student(self) -> HiddenStateGPT:
        """The Megatron model inside NeMo's and Megatron's wrappers."""
        module: Any = self.module
        while not isinstance(module, HiddenStateGPT):
            module = module.module
        return module

    @property
    def training_loss_reduction(self) -> MegatronLossReduction:
        """How NeMo turns what `training_step` returns into Megatron's (sum, tokens, metrics)."""
        return self._reduction


class SumReduction(MegatronLossReduction):
    """Unpacks `LossTerms` for Megatron's per-token contract and keeps the step's sums for the meters."""

    def __init__(self, owner: TrainingModule) -> None:
        """`owner.step_sums` receives the sums of the micro-batches of each step."""
        super().__init__()
        self._owner = [owner]  # in a list: the owner is not to become a submodule of its own part

    def forward(self, batch: Batch, terms: LossTerms) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss sum with gradient, number of valid tokens, sums for the meters) of one micro-batch."""
        return terms.loss_sum, terms.num_tokens, terms.sums

    def reduce(self, losses_reduced_per_micro_batch: list[torch.Tensor]) -> torch.Tensor:
        """This replica's mean loss of the step, nats per valid token (last stage only)."""
        sums = torch.stack(list(losses_reduced_per_micro_batch)).sum(0)
        self._owner[0].step_sums = sums
        return (sums[0] / sums[-1].clamp(min=1)).float()


def reduced_step_means(module: TrainingModule) -> dict[str, float]:
    """Means over all valid tokens of the step just done, on every rank (one all-reduce, one broadcast).

    Losses in nats/token and agreement as a fraction, over the global number of valid tokens, which is
    under `tokens`.
    """
    sums = groups.sum_over_replicas_from_last_stage(module.step_sums.clone().to(device()))
    return module.finish_step(means_of(sums, module.meters) | {"tokens": float(sums[-1])})


def means_of(sums: torch.Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """Means over valid tokens of the `names` among METERS, from sums over all replicas `[len(METERS)]`."""
    values = dict(zip(METERS, sums.tolist(), strict=True))
    return {name: values[name] / max(values["tokens"], 1.0) for name in names if name != "tokens"}
