"""The nodes of the training stages: optimizer, steps, correction of the teacher, distillation, alignment."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

ALIGN_SOURCES = ("file", "generate")
KD_LOSSES = ("kl", "reverse_kl", "js", "mse", "cosine", "top_k_kl")


@dataclass
class OptimConfig:
    """Adam with linear warm-up and cosine decay."""

    lr: float = 2e-3
    """Peak learning rate."""
    min_lr: float = 2e-5
    """Where the cosine ends, one step after the last one."""
    warmup_steps: int = 50
    """Steps of linear warm-up, from lr / (warmup_steps + 1)."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest global norm of the gradient."""


@dataclass
class StopConfig:
    """Where a training ends early, whichever comes first; the learning rate goes on as if for the whole of it."""

    tokens: int | None = None
    """Training tokens."""
    steps: int | None = None
    """Steps."""
    seconds: float | None = None
    """Seconds in training steps, over all runs of the stage."""
    heldout_ce: float | None = None
    """Held-out loss of a look, nats/token: the first that is no higher is the last."""


@dataclass
class ProfileConfig:
    """A trace of a few steps, for Perfetto or chrome://tracing."""

    first_step: int | None = None
    """First step that is traced, from 1; null: none."""
    num_steps: int = 3


@dataclass
class PhaseConfig:
    """A part of a training with sizes of its own; null keeps the recipe's."""

    tokens: int = MISSING
    """Training tokens, rounded up to whole steps."""
    seq_length: int | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | None = None


@dataclass
class TrainConfig:
    """What all training stages share."""

    global_batch_size: int = 32
    """Samples a step, over all replicas."""
    micro_batch_size: int = 8
    """Samples a forward-backward pass of one replica."""
    precision: str = "32"
    """Of the training stages: 32, or bf16-mixed (bf16 with fp32 master weights). The others run in fp32."""
    log_every_steps: int = 10
    """Steps between two lines of progress."""
    loggers: list[str] = field(default_factory=list)
    """Where the meters go besides `metrics.jsonl` and TensorBoard: wandb, mlflow; keys come from the environment."""
    eval_every_steps: int = 100
    """Steps between two looks at held-out data; 0: none."""
    eval_samples: int = 64
    """Held-out samples of each such look."""
    checkpoint_every_steps: int = 50
    """Steps between two resume checkpoints."""
    checkpoint_async: bool = True
    """Write them beside the steps that follow, from a copy in host memory of each rank's share; false: in between."""
    not_finite: str = "stop"
    """When a loss or gradient is NaN or infinite: stop, or skip (leave the step out)."""
    chunk_tokens: int = 256
    """Tokens the loss works on at a time: its memory is proportional to it."""
    recompute: str = "none"
    """Activations computed again in the backward pass: none; selective (core attention); full (every layer)."""
    last_batch: str = "full"
    """full: the last step has as many samples as every other; partial: no more than the budget of tokens asks for."""
    keep_best: bool = False
    """Also keep the weights with the lowest held-out loss of the looks, and let them be the stage's result."""
    stop: StopConfig = field(default_factory=StopConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    peak_tflops: float | None = None
    """Of one device in the training's precision, for model FLOPs utilisation; null: of known GPUs from a table."""


@dataclass
class OwnOptim:
    """A training's own learning rate in the place of `optim`'s."""

    lr: float | None = None
    """Peak learning rate; null, here and below: that of `optim`."""
    min_lr: float | None = None
    warmup_steps: int | None = None

    def optim(self, optim: OptimConfig) -> OptimConfig:
        """`optim` with this node's own numbers in place."""
        own: dict[str, Any] = {"lr": self.lr, "min_lr": self.min_lr, "warmup_steps": self.warmup_steps}
        return dataclasses.replace(optim, **{key: value for key, value in own.items() if value is not None})


@dataclass
class CorrectConfig(OwnOptim):
    """Cross-entropy training of the teacher ("teacher correction", arXiv:2408.11796)."""

    tokens: int = 1_000_000
    """Training tokens, rounded up to whole steps."""
    snapshot_every_steps: int | None = None
    """Steps between two Hugging Face directories of the teacher on its way, for a distillation that runs meanwhile."""


@dataclass
class ScratchUntilConfig(OwnOptim):
    """The control `scratch_until`: the pruned architecture from random weights until it equals the distilled model."""

    max_ratio: float = 10.0
    """Training tokens at most, over those of the distillation; the learning rate decays over all of them."""


@dataclass
class TeacherPlacementConfig:
    """Where and how the teacher runs while the student trains."""

    tp: int | None = None
    """Tensor-parallel degree of the teacher on the same ranks; null: the student's."""
    pp: int | None = None
    """Pipeline-parallel degree; null: the student's. Its data-parallel degree is what remains of the ranks."""
    precision: str | None = None
    """32, bf16, or fp8 (bf16 weights, fp8 GEMMs of Transformer Engine); null: bf16 with bf16-mixed training."""
    offload_weights: bool = False
    """Keep its weights in host memory between steps."""
    offload_states: bool = False
    """Keep what it hands over in (pinned) host memory until the student needs it."""
    snapshots: str | None = None
    """Folder of snapshots that a run with `correct.snapshot_every_steps` writes meanwhile; null: one teacher."""
    exchange_every_steps: int = 100
    """Steps between two looks for a newer snapshot."""


@dataclass
class IntermediateTermConfig:
    """A state of the teacher that the student is to have too."""

    state: str = MISSING
    """hidden (output of a layer, after the next norm), embedding, mlp_input, attention (relations, MiniLMv2)."""
    layers: str = "last-2:last-2"
    """TEACHER:STUDENT, each a number from 0, last, or last-N."""
    loss: str = "cosine"
    """cosine or mse; attention has its own."""
    weight: float = 1.0
    """Among the terms."""


@dataclass
class IntermediateConfig:
    """Losses of intermediate states (arXiv:2407.14679, section 3 and appendix A.6); none unless `terms` has some."""

    terms: list[IntermediateTermConfig] = field(default_factory=list)
    alpha: float | None = None
    """Weight of their sum; null: loss of the logits over that sum, of the step before."""
    relation_heads: int | None = None
    """Heads that attention's relations are cut into; null: the student's KV groups."""


@dataclass
class DistillConfig:
    """Recovery of the pruned model; the controls train on the same number of tokens."""

    tokens: int = 1_000_000
    """Training tokens, rounded up to whole steps."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """Parts with other batch sizes or sample lengths, one after another in one training, in place of `tokens`."""
    teacher: TeacherPlacementConfig = field(default_factory=TeacherPlacementConfig)
    intermediate: IntermediateConfig = field(default_factory=IntermediateConfig)
    loss: str = "kl"
    """Loss of the logits: kl (of teacher and student, the papers' choice), reverse_kl, js, mse, cosine, or top_k_kl."""
    kd_weight: float = 1.0
    """Its weight; of divergences, nats/token."""
    temperature: float = 1.0
    """Divides the logits of kl, reverse_kl and js, whose value is multiplied by its square."""
    top_k: int = 64
    """Tokens of top_k_kl; the rest of the vocabulary is one bucket."""
    cached: bool = False
    """Read the teacher's likeliest tokens from disk (stage cache_teacher) instead of running it; needs top_k_kl."""
    cache: str | None = None
    """Folder of a cache from another run; null: that of the stage cache_teacher."""
    cache_dtype: str = "float16"
    """How log-probabilities are stored: float16 or float32."""
    ce_weight: float = 0.0
    """Weight of the cross-entropy with the text, nats/token."""


@dataclass
class AlignPhaseConfig:
    """A training of its own within the alignment, from the weights of the one before; null keeps what `align` says."""

    name: str = MISSING
    """Of its folder and of its loss in the summary."""
    source: str = "file"
    """As `align.source`."""
    path: str | None = None
    """Of its conversations; a relative path is below `align.path`, where that is given."""
    tokens: int | None = None
    lr: float | None = None
    min_lr: float | None = None
    warmup_steps: int | None = None
    seq_length: int | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | None = None


@dataclass
class AlignConfig:
    """Supervised fine-tuning on conversations: cross-entropy of their answers alone."""

    model: str = "auto"
    """What is tuned: distilled, pruned, teacher, a Hugging Face directory, or auto: distilled where the recipe has the
    stage distill or no prune, else pruned."""
    source: str = "file"
    """Where conversations come from: file, or generate: the answers that the stage generate has written (SDG)."""
    path: str | None = None
    """JSON lines of `messages`, or a folder of such files, where `source` is file."""
    chat_template: str | None = None
    """A file with a Jinja template, which the tuned model takes along; null: that of the model's tokenizer."""
    packing: str = "documents"
    """documents: whole conversations side by side in a sample, attention inside each; none: one a sample."""
    seq_length: int | None = None
    """Tokens a sample; null: `data.seq_length`."""
    num_heldout: int | None = None
    """Last conversations of each source that are not trained on; null: `heldout_fraction`."""
    heldout_fraction: float = 0.05
    tokens: int = 1_000_000
    """Places in samples, answers and all else, rounded up to whole steps."""
    lr: float | None = None
    """Peak learning rate; null, here and below: that of `optim`."""
    min_lr: float | None = None
    warmup_steps: int | None = None
    global_batch_size: int | None = None
    """Samples a step; null, here and below: that of `train`."""
    micro_batch_size: int | None = None
    phases: list[AlignPhaseConfig] = field(default_factory=list)
    """Trainings one after another, each on its own conversations; none: one, as this node says."""
