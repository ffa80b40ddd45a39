"""NeMo's Megatron strategy as this project uses it: our step description and our resume checkpoints."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo import lightning as nl
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.plugins.data_sampler import DataSampler
from torch.utils.data import DataLoader, IterableDataset

from nemo_minitron.data.batch import Batch, Samples
from nemo_minitron.data.samples import positions_for
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.cpu import device
from nemo_minitron.parallel.layout import Layout
from nemo_minitron.training.budget import Phase, phase_at


class PlainStep(MegatronStep):
    """A step without NeMo's own distillation: looking for it would import all of `nemo.collections.llm`."""

    adjust_tensor_shapes_fn = None


class StepSampler(DataSampler):
    """Tells NeMo the shape of a step, and lets the module see its micro-batches first where it needs them."""

    def __init__(self, phases: Sequence[Phase], *, dp: int) -> None:
        """The sizes of each step are those of its phase; `dp` replicas share a global batch."""
        self.phases = phases
        self.dp = dp
        # NeMo reads these of a sampler; they are those of the first phase, and nothing depends on them
        self.seq_len, self.micro_batch_size = phases[0].seq_length, phases[0].micro_batch_size

    def setup(self, global_rank: int) -> None:
        """Nothing: there is no micro-batch calculator to set up, the sizes are constant within a stage."""

    def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
        """The loader as it is: `TrainingOrder` already gives each replica its own micro-batches."""
        return dataloader

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        """Describe the step (NeMo calls this on every rank before Megatron's schedule)."""
        module = step.pl_module
        data: Any = step.data
        phase = phase_at(self.phases, module.trainer.global_step)
        count = phase.num_microbatches(self.dp)
        if module.needs_batches:
            batches = [module.data_step(data) for _ in range(count)]
            module.before_step(batches)
            data = iter(batches)
        known = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}
        return PlainStep(**known | {"data": data, "seq_length": phase.seq_length, "num_microbatches": count,
                                    "micro_batch_size": phase.micro_batch_size})


class TrainingOrder(IterableDataset):
    """This replica's micro-batches from `first_step` on, without end; keyed by position, so resumable at any DP."""

    def __init__(self, samples: Callable[[int], Samples], phases: Sequence[Phase], *, seed: int,
                 layout: Layout) -> None:
        """`samples` gives those of a length. Each phase has an order of its own.

        Raises `DataError` for less than one sample of text, `ConfigError` for sizes that do not divide.
        """
        self.samples = {phase.seq_length: samples(phase.seq_length) for phase in phases}
        self.phases = phases
        self.seed = seed
        self.dp = {"dp_rank": groups.dp_rank(), "dp_size": layout.dp}
        for phase in phases:
            self.samples[phase.seq_length].check_training()
            positions_for(0, **self._sizes(phase))
        self.first_step = 0

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches in order, on this rank's device."""
        step = self.first_step
        while True:
            phase = phase_at(self.phases, step)
            samples, seed = self.samples[phase.seq_length], self.seed + self.phases.index(phase)
            for positions in positions_for(step - phase.first_step, **self._sizes(phase)):
                batch = samples.batch([samples.training_id(position, seed) for position in positions])
                for row, position in enumerate(positions):
                    if position >= phase.samples:  # beyond the budget, in the last step
                        batch.loss_mask[row] = 0.0
                yield batch.to(device())
            step += 1

    def _sizes(self, phase: Phase) -> dict[str, int]:
        return {"global_batch_size": phase.global_batch_size, "micro_batch_size": phase.micro_batch_size, **self.dp}


class Strategy(nl.MegatronStrategy):
    """`MegatronStrategy` in a worker whose process groups are already formed.

    Its resume checkpoints are Megatron's sharded ones, written and read through Megatron-core directly:
    NeMo's own way there imports `nemo.collections.llm`, asserts CUDA and builds a CUDA device mesh.
    """

    def __init__(self, layout: Layout, *, config: TransformerConfig, sampler: StepSampler, bf16: bool,
                 distributed_optimizer: bool) -> None:
        """`layout` must be the one whose groups are formed; `config` is the model's."""
        super().__init__(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            pipeline_model_parallel_layout=config.pipeline_model_parallel_layout,  # it overwrites the model's own
            sequence_parallel=layout.sequence_parallel and layout.tp > 1,
            pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
            data_sampler=sampler,
            ckpt_async_save=False,
            replace_progress_bar=False,
            ddp=DistributedDataParallelConfig(
                check_for_nan_in_grad=True, grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer,
                overlap_grad_reduce=False,
            ),
        )

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Begin a checkpoint of model, optimizer and loop states in the folder `filepath`; every rank must call this.

        The tensors are yet to be written: `request` is what a `Writing` takes.
        """
        checkpoint["state_dict"] = OrderedDict()
        checkpoint["optimizer_states"] = {}
        checkpoint["sharded_state_dict"] = self.megatron_parallel.sharded_state_dict()
        checkpoint["optimizer"] = [self.optimizer_sharded_state_dict()]
        self.request = dist_checkpointing.save(checkpoint, str(filepath), async_sharded_save=True,
                                               content_metadata=self.sharded_state_dict_metadata)

    def load_checkpoint(self, checkpoint_path: str | Path, selective_restore: bool = False) -> dict[str, Any]:
        """Read what `save_checkpoint` wrote, under this or another layout."""
        metadata = dist_checkpointing.load_content_metadata(str(checkpoint_path))
        wanted = {
            "sharded_state_dict": self.megatron_parallel.sharded_state_dict(metadata=metadata),
            "optimizer": [self.optimizer_sharded_state_dict(is_loading=True, metadata=metadata)],
        }
        loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(checkpoint_path))
        loaded["state_dict"] = loaded.pop("sharded_state_dict")
        return loaded

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any], selective_restore: bool = False) -> None:
        """Give the optimizer its loaded states."""
        optimizers: Iterable[Any] = self.optimizers
        for optimizer, state in zip(optimizers, checkpoint["optimizer"], strict=True):
            optimizer.load_state_dict(state)
