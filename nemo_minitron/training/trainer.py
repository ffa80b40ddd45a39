"""Assembles NeMo's trainer for one training stage and runs it to its last step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from lightning.pytorch.loggers import TensorBoardLogger
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler
from torch.utils.data import DataLoader

from nemo_minitron.artifacts import Checkpoint
from nemo_minitron.checkpoint.save import save_checkpoint
from nemo_minitron.config import OptimConfig, TrainConfig
from nemo_minitron.data.batch import Samples
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.cpu import cuda_is_available, write_checkpoints_in_process
from nemo_minitron.parallel.layout import Layout
from nemo_minitron.training.budget import check_warmup, num_steps
from nemo_minitron.training.callbacks import HeldOut, Meters, ResumePoints, deterministic_cpu, newest_resume_point
from nemo_minitron.training.module import TrainingModule
from nemo_minitron.training.strategy import StepSampler, Strategy, TrainingOrder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training run counted: valid training tokens, seconds in steps, steps."""

    tokens: int
    seconds: float
    steps: int

    @property
    def tokens_per_s(self) -> float:
        """Training tokens a second, over the steps alone."""
        return self.tokens / self.seconds if self.seconds else 0.0


def fit(
    module: TrainingModule,
    samples: Samples,
    *,
    label: str,
    directory: Path,
    tokens: int,
    layout: Layout,
    train: TrainConfig,
    optim: OptimConfig,
    seed: int,
    distributed_optimizer: bool,
    measure: Callable[[TrainingModule], float],
) -> Trained:
    """Train `module` on `tokens` tokens of `samples`, going on from the newest resume point in `directory`.

    Every rank must call this. `metrics.jsonl`, TensorBoard logs and resume points go to `directory`.

    Raises:
        ConfigError: batch sizes that do not divide, or a warm-up longer than the run.
        DataError: text shorter than one sample.
    """
    seq_length = samples.seq_length
    steps = num_steps(tokens, global_batch_size=train.global_batch_size, seq_length=seq_length)
    check_warmup(optim.warmup_steps, steps)
    order = TrainingOrder(samples, seed=seed, global_batch_size=train.global_batch_size,
                          micro_batch_size=train.micro_batch_size, layout=layout)
    bf16 = train.precision == "bf16-mixed"
    _optimizer(optim, bf16=bf16, distributed=distributed_optimizer).connect(module)
    meters = Meters(directory / "metrics.jsonl", label=label, log_every_steps=train.log_every_steps)
    held_out = HeldOut(meters, every_steps=train.eval_every_steps)
    points = ResumePoints(directory / "resume", every_steps=train.checkpoint_every_steps)
    sampler = StepSampler(seq_length=seq_length, micro_batch_size=train.micro_batch_size,
                          num_microbatches=train.global_batch_size // (train.micro_batch_size * layout.dp))
    trainer = nl.Trainer(
        accelerator="gpu" if cuda_is_available() else "cpu",
        devices=layout.world_size,
        strategy=Strategy(layout, config=module.config, sampler=sampler, bf16=bf16,
                          distributed_optimizer=distributed_optimizer),
        plugins=nl.MegatronMixedPrecision(precision=train.precision, grad_reduce_in_fp32=True),
        max_steps=steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=train.log_every_steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        logger=TensorBoardLogger(save_dir=str(directory), name="tensorboard", version=""),
        callbacks=[meters, held_out, points],
    )
    held_out.measure = measure
    resume = newest_resume_point(directory / "resume")
    if resume is not None:
        order.first_step = int(resume.name.removeprefix("step_"))
        if dist.get_rank() == 0:
            print(f"[{label}] going on from step {order.first_step}", flush=True)
    write_checkpoints_in_process()
    deterministic_cpu()
    groups.seed_everything(seed)
    trainer.fit(module, train_dataloaders=DataLoader(order, batch_size=None), ckpt_path=resume)
    return Trained(tokens=int(meters.tokens), seconds=meters.seconds, steps=steps)


def export(module: TrainingModule, directory: Path, *, base: Checkpoint, layout: Layout) -> None:
    """Write the trained weights as a Hugging Face directory, from all pipeline stages; every rank must call this."""
    from megatron.core import parallel_state

    student = module.student
    save_checkpoint(
        student.named_parameters(), module.arch, directory, base_directory=base.path,
        tp_group=parallel_state.get_tensor_model_parallel_group(), tp_rank=groups.tp_rank(), tp_size=layout.tp,
        pp_rank=groups.pp_rank(), pp_size=layout.pp, dp_rank=groups.dp_rank(), layer_offset=student.layer_offset,
        dtype=None, barrier=dist.barrier,
    )


def _optimizer(optim: OptimConfig, *, bf16: bool, distributed: bool) -> nl.MegatronOptimizerModule:
    return nl.MegatronOptimizerModule(
        config=OptimizerConfig(
            optimizer="adam", lr=optim.lr, min_lr=optim.min_lr, weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1, adam_beta2=optim.beta2, adam_eps=optim.eps, clip_grad=optim.clip_grad,
            bf16=bf16, use_distributed_optimizer=distributed,
        ),
        lr_scheduler=CosineAnnealingScheduler(warmup_steps=optim.warmup_steps, constant_steps=0, min_lr=optim.min_lr),
    )
