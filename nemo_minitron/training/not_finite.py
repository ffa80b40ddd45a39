"""A loss or gradient that is NaN or infinite: says where it was, keeps the batch, and stops or leaves the step out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from nemo_minitron.data.batch import Batch
from nemo_minitron.parallel.cpu import device

MAX_SKIPPED = 10
"""Steps left out in a row after which training stops all the same."""


class NotFinite(Exception):
    """A loss or gradient that is NaN or infinite, in a run that is to stop for it."""


class FiniteGradients(pl.Callback):
    """Looks at every rank's loss and gradients of a step before they are summed over replicas.

    Costs a pass over the gradients and one all-reduce of a number. The batches of a bad step are written to
    `not_finite/step_N_rank_R.safetensors` by the ranks that have them, those of the last pipeline stage.
    """

    def __init__(self, directory: Path, *, action: str, label: str) -> None:
        """`directory` is the stage's own; `action` is stop or skip (leave the step out and go on)."""
        self.directory = directory / "not_finite"
        self.skips = action == "skip"
        self.label = label
        self.skipped = 0
        self._seen: list[tuple[Batch, torch.Tensor]] = []
        self._leave_out = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the look between Megatron's schedule and its reduction of the gradients."""
        module: Any = pl_module
        module.training_loss_reduction.register_forward_hook(
            lambda reduction, inputs, output: self._seen.append((inputs[0], output[0].detach())))
        config, reduce = module.config, module.config.finalize_model_grads_func

        def look_and_reduce(model: list[Any], *args: Any, **kwargs: Any) -> Any:
            self._look(trainer.global_step + 1, model)
            return reduce(model, *args, **kwargs)

        config.finalize_model_grads_func = look_and_reduce
        if self.skips:
            for optimizer in trainer.optimizers:
                self._guard(optimizer.mcore_optimizer)

    def _guard(self, optimizer: Any) -> None:
        step = optimizer.step

        def step_unless_left_out(*args: Any, **kwargs: Any) -> Any:
            return (True, 0.0, 0) if self._leave_out else step(*args, **kwargs)

        optimizer.step = step_unless_left_out

    def _look(self, step: int, model: list[Any]) -> None:
        """Raise `NotFinite`, or have the step left out, where any rank has something that is not finite."""
        seen, self._seen = self._seen, []
        bad = first_bad([loss for _, loss in seen], ((name, parameter) for chunk in model
                                                     for name, parameter in chunk.named_parameters()))
        flag = torch.tensor([0 if bad is None else 1], dtype=torch.int32, device=device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self._leave_out = bool(flag)
        if not self._leave_out:
            self.skipped = 0
            return
        self._keep(step, [batch for batch, _ in seen])
        self.skipped += 1
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, bad)
        words = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None)
        message = f"step {step} of {self.label} is not finite: {words}; its batch is in {self.directory}"
        if not self.skips or self.skipped > MAX_SKIPPED:
            raise NotFinite(message)
        if dist.get_rank() == 0:
            print(f"[{self.label}] {message}; the step is left out ({self.skipped} in a row)", flush=True)
        for chunk in model:
            chunk.zero_grad_buffer()

    def _keep(self, step: int, batches: list[Batch]) -> None:
        if not batches:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        names = ("tokens", "labels", "loss_mask")
        tensors = {name: torch.cat([getattr(batch, name) for batch in batches]).cpu().contiguous() for name in names}
        save_file(tensors, self.directory / f"step_{step:08d}_rank_{dist.get_rank()}.safetensors")


def first_bad(losses: list[torch.Tensor], parameters: Iterable[tuple[str, Any]]) -> str | None:
    """The first of the micro-batches' losses and the parameters' gradients that is not finite, in words; or None.

    `parameters` are Megatron's: their gradients of the step, not yet summed over replicas, are in `main_grad`.
    """
    for number, loss in enumerate(losses):
        if not bool(torch.isfinite(loss).all()):
            return f"loss of micro-batch {number} is {float(loss)}"
    for name, parameter in parameters:
        gradient = getattr(parameter, "main_grad", None)
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            count = int((~torch.isfinite(gradient)).sum())
            return f"gradient of {name.removeprefix('module.')} has {count} of {gradient.numel()} values not finite"
    return None
