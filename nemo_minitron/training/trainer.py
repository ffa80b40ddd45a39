"""Assembles NeMo's trainer for one training stage and runs it to its last step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler
from torch.utils.data import DataLoader

from nemo_minitron.artifacts import Checkpoint
from nemo_minitron.checkpoint.save import save_checkpoint
from nemo_minitron.config import OptimConfig, TrainConfig
from nemo_minitron.data.batch import Samples
from nemo_minitron.launch import signals
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.cpu import cuda_is_available, write_checkpoints_in_process
from nemo_minitron.parallel.layout import Layout
from nemo_minitron.training.budget import Phase, check_warmup
from nemo_minitron.training.callbacks import HeldOut, Meters, Standing, deterministic_cpu
from nemo_minitron.training.environment import JoinedRanks, processes
from nemo_minitron.training.limits import Profiler, StopEarly
from nemo_minitron.training.module import TrainingModule
from nemo_minitron.training.not_finite import FiniteGradients
from nemo_minitron.training.points import ResumePoints, point_to_go_on_from
from nemo_minitron.training.strategy import StepSampler, Strategy, TrainingOrder
from nemo_minitron.training.throughput import peak_tflops
from nemo_minitron.training.trackers import Subject, Trackers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training run counted: valid training tokens, seconds in steps, steps; and its best look, where kept.

    `best_loss` is held-out cross-entropy, nats/token; `best_folder` has the weights of that step.
    """

    tokens: int
    seconds: float
    steps: int
    best_step: int | None = None
    best_loss: float | None = None
    best_folder: Path | None = None

    @property
    def tokens_per_s(self) -> float:
        """Training tokens a second, over the steps alone."""
        return self.tokens / self.seconds if self.seconds else 0.0


def fit(
    module: TrainingModule,
    samples: Callable[[int], Samples],
    *,
    label: str,
    directory: Path,
    title: str | None = None,
    phases: Sequence[Phase],
    layout: Layout,
    train: TrainConfig,
    optim: OptimConfig,
    seed: int,
    distributed_optimizer: bool,
    measure: Callable[[TrainingModule], dict[str, float]],
    keep: Callable[[TrainingModule, Path], None] | None = None,
    callbacks: Sequence[Callback] = (),
    pause_step: int | None = None,
) -> Trained:
    """Train `module` through `phases`, going on from the newest resume point in `directory`.

    Every rank must call this. `metrics.jsonl`, TensorBoard logs and resume points go to `directory`.

    Args:
        module: model, loss and teacher.
        samples: training samples of a length, in tokens.
        label: begins each line of progress.
        directory: the stage's own.
        title: NAME/round/stage, for `train.loggers`; None: `label`.
        phases: `plan_phases` of the recipe.
        layout: the layout whose groups are formed.
        train: how often to log, look and save, when to stop.
        optim: of Adam and the learning rate.
        seed: of the samples' order.
        distributed_optimizer: shard the optimizer over DP.
        measure: held-out means by name; `ce` in nats/token decides which weights are best.
        keep: writes the weights to a folder; used with `train.keep_best`.
        callbacks: come right after the meters.
        pause_step: end after this step, with a resume point; the learning rate goes on as if for all steps.

    Raises:
        ConfigError: batch sizes that do not divide, or a warm-up longer than the run.
        DataError: text shorter than one sample.
    """
    steps = sum(phase.steps for phase in phases)
    check_warmup(optim.warmup_steps, steps)
    order = TrainingOrder(samples, phases, seed=seed, layout=layout)
    bf16 = train.precision == "bf16-mixed"
    _optimizer(optim, bf16=bf16, distributed=distributed_optimizer).connect(module)
    meters = Meters(directory / "metrics.jsonl", label=label, log_every_steps=train.log_every_steps,
                    peak_tflops=peak_tflops(train.precision, train.peak_tflops),
                    trackers=_trackers(title or label, label, directory, layout=layout, train=train, optim=optim))
    held_out = HeldOut(meters, every_steps=train.eval_every_steps, measure=measure, directory=directory,
                       keep_best=keep if train.keep_best else None, stop_at=train.stop.heldout_ce)
    points = ResumePoints(directory / "resume", every_steps=train.checkpoint_every_steps, label=label,
                          beside=train.checkpoint_async, pause_step=pause_step)
    stop = train.stop if pause_step is None else dataclasses.replace(train.stop, steps=pause_step)
    finite = FiniteGradients(directory, action=train.not_finite, label=label)
    trainer = nl.Trainer(
        accelerator="gpu" if cuda_is_available() else "cpu",
        **processes(),
        strategy=Strategy(layout, config=module.config, sampler=StepSampler(phases, dp=layout.dp), bf16=bf16,
                          distributed_optimizer=distributed_optimizer),
        plugins=[nl.MegatronMixedPrecision(precision=train.precision, grad_reduce_in_fp32=True), JoinedRanks()],
        max_steps=steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=train.log_every_steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        logger=TensorBoardLogger(save_dir=str(directory), name="tensorboard", version=""),
        callbacks=[Standing(), finite, Profiler(train.profile, directory / "profile"), meters, StopEarly(stop, meters),
                   *callbacks, held_out, points],
    )
    resume = point_to_go_on_from(directory / "resume", label=label)
    if resume is not None:
        order.first_step = int(resume.name.removeprefix("step_"))
        if dist.get_rank() == 0:
            print(f"[{label}] going on from step {order.first_step}", flush=True)
    write_checkpoints_in_process()
    deterministic_cpu()
    groups.seed_everything(seed)
    trainer.fit(module, train_dataloaders=DataLoader(order, batch_size=None), ckpt_path=resume)
    signals.dump_on_request()
    best = held_out.best or {}
    return Trained(tokens=int(meters.tokens), seconds=meters.seconds, steps=trainer.global_step,
                   best_step=best.get("step"), best_loss=best.get("ce"),
                   best_folder=held_out.directory / best["folder"] if best else None)


def export(module: TrainingModule, directory: Path, *, base: Checkpoint, layout: Layout) -> None:
    """Write the trained weights as a Hugging Face directory, from all pipeline stages; every rank must call this."""
    from megatron.core import parallel_state

    student = module.student
    save_checkpoint(
        student.exported_parameters(), module.arch, directory, base_directory=base.path,
        tp_group=parallel_state.get_tensor_model_parallel_group(), tp_rank=groups.tp_rank(), tp_size=layout.tp,
        pp_rank=groups.pp_rank(), pp_size=layout.pp, dp_rank=groups.dp_rank(), layer_offset=student.layer_offset,
        dtype=None, barrier=dist.barrier,
    )


def _trackers(title: str, label: str, directory: Path, *, layout: Layout, train: TrainConfig,
              optim: OptimConfig) -> Trackers | None:
    """Those that `train.loggers` names, on rank 0."""
    if dist.get_rank() != 0 or not train.loggers:
        return None
    parameters = {"train": dataclasses.asdict(train), "optim": dataclasses.asdict(optim),
                  "layout": dataclasses.asdict(layout)}
    return Trackers(train.loggers, Subject(title=title, label=label, directory=directory, parameters=parameters))


class Optimizer(nl.MegatronOptimizerModule):
    """NeMo's, with a word of the module's own before the gradients are reduced."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep the module for `finalize_model_grads`."""
        super().on_fit_start(trainer, pl_module)
        self._owner = [pl_module]

    def finalize_model_grads(self, *args: Any, **kwargs: Any) -> Any:
        """Called by Megatron at the end of a step's schedule."""
        self._owner[0].sum_gradients()
        return super().finalize_model_grads(*args, **kwargs)


def _optimizer(optim: OptimConfig, *, bf16: bool, distributed: bool) -> Optimizer:
    return Optimizer(
        config=OptimizerConfig(
            optimizer="adam", lr=optim.lr, min_lr=optim.min_lr, weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1, adam_beta2=optim.beta2, adam_eps=optim.eps, clip_grad=optim.clip_grad,
            bf16=bf16, use_distributed_optimizer=distributed,
        ),
        lr_scheduler=CosineAnnealingScheduler(warmup_steps=optim.warmup_steps, constant_steps=0, min_lr=optim.min_lr),
    )
