"""The configuration: one dataclass for each node of `conf/`, with units. `compose` fills them.

Components get their own node only; the whole `Config` goes no further than the stages.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

KD_LOSSES = ("kl", "reverse_kl", "js", "mse", "cosine", "top_k_kl")
STAGES = ("initialize", "correct", "score", "prune", "cache_teacher", "distill", "ce", "scratch", "evaluate", "report")
CONTROLS = ("ce", "scratch")
LAYER_METRICS = ("block_influence", "loss", "accuracy", "logit_mse", "removal_order")


@dataclass
class TeacherConfig:
    """The model that is pruned and whose logits are distilled."""

    path: str | None = None
    """Hugging Face directory; null where the stage `initialize` makes it."""
    licence: str = "see the source checkpoint"
    """Stated in the model card of everything derived from it."""


@dataclass
class ModelConfig:
    """Architecture that the stage `initialize` gives random weights (a Llama)."""

    num_layers: int = 6
    hidden_size: int = 192
    ffn_hidden_size: int = 512
    num_attention_heads: int = 6
    num_query_groups: int = 2
    head_dim: int = 32
    vocab_size: int = 2048
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied_embeddings: bool = True


@dataclass
class BlendSource:
    """One source of a blend."""

    name: str = MISSING
    path: str = MISSING
    """As `data.path`."""
    weight: float = 1.0
    """Only proportions count."""


@dataclass
class DataConfig:
    """Text or tokens, cut into samples of `seq_length` tokens, each with an id."""

    kind: str = "auto"
    """corpus (the embedded sympy sources), text, indexed (.bin/.idx), or auto: by what `path` is."""
    path: str | None = None
    """A text file, a folder of text files, or the prefix of a .bin/.idx pair; null means corpus."""
    separator: str | None = None
    """String between documents inside a text file; null: each file is one document."""
    json_key: str = "text"
    """Where the text is in a line of a `*.jsonl` file."""
    blend: list[BlendSource] = field(default_factory=list)
    """Several sources instead of `path`: training and calibration samples by weight, all of their held-out text."""
    num_heldout: int | None = None
    """Number of last documents kept for evaluation; null: `heldout_fraction`."""
    heldout_fraction: float = 0.05
    """Fraction of the documents, the last ones, kept for evaluation."""
    calibration_fraction: float = 0.1
    """Fraction of the training documents, chosen by hash, that importance is measured on (text only)."""
    seq_length: int = 256
    """Tokens a sample."""


@dataclass
class ParallelConfig:
    """How the processes share one model. World size is tp * pp * dp."""

    tp: int = 1
    """Tensor-parallel degree."""
    pp: int = 1
    """Pipeline-parallel degree."""
    dp: int = 1
    """Data-parallel degree."""
    sequence_parallel: bool = False
    """Shard the norms' activations over the tensor-parallel group, along the sequence."""
    cp: int = 1
    """Context-parallel degree: only 1, the losses and the importance know no shards of a sequence."""
    interleave: int = 1
    """Model chunks a pipeline stage: only 1, the interleaved schedule is not supported."""
    distributed_optimizer: bool = False
    """Shard optimizer states over data parallelism (needs Transformer Engine or Apex to resume)."""
    num_threads: int | None = None
    """CPU threads a process; null: all cores shared evenly."""
    timeout_s: int = 600
    """Longest time a collective may wait, seconds."""


@dataclass
class DepthConfig:
    """Importance of layers and blocks of layers from runs without them; block influence needs none of this."""

    metrics: list[str] = field(default_factory=list)
    """Of loss (nats/token, and with it perplexity), logit_mse, accuracy (of `task`)."""
    block_lengths: list[int] = field(default_factory=lambda: [1])
    """Lengths of the contiguous blocks that are left out; 1: every single layer."""
    iterative: bool = False
    """Also remove layer after layer by logit_mse, each time the one that is missed least."""
    num_samples: int = 64
    """Calibration samples that the metrics are measured on."""
    task: str | None = None
    """File of multiple-choice questions for accuracy; docs/pruning.md has the form."""


@dataclass
class ImportanceConfig:
    """Importance from activations (arXiv:2407.14679, section 2.2), or a baseline to compare with."""

    method: str = "activations"
    """activations; magnitude (norms of the weights); random."""
    num_samples: int = 1024
    """Calibration samples."""
    micro_batch_size: int = 8
    """Samples a forward pass."""
    neurons: str = "post_activation"
    """What is measured of FFN neurons: post_activation (the official code) or pre_activation (the paper)."""
    heads: str = "channels"
    """And of heads: channels, each over the sequence, then their norm (the official code); or tokens, the norm of each
    token's output (the paper)."""
    batch: str = "l2"
    """Aggregation over samples: mean, l2 or var."""
    sequence: str = "mean"
    """Aggregation over a sample's tokens: mean (of absolute values), l2 or var."""
    norms: list[str] = field(default_factory=lambda: ["input", "pre_mlp"])
    """Norms whose outputs count for hidden channels: input, pre_mlp, final."""
    ranking: str = "per_layer"
    """per_layer: each layer ranks its own neurons and heads; summed: scores are summed over layers first."""
    iterations: int = 1
    """Steps from the source's to the target's widths, importance measured anew at each."""
    depth: DepthConfig = field(default_factory=DepthConfig)


@dataclass
class TargetConfig:
    """Sizes after pruning; null keeps the source's."""

    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None


@dataclass
class RatioConfig:
    """Fractions of the source's sizes that stay, rounded to `prune.divisors`; null: see `prune.target`."""

    num_layers: float | None = None
    hidden_size: float | None = None
    ffn_hidden_size: float | None = None
    num_attention_heads: float | None = None
    num_query_groups: float | None = None


@dataclass
class BudgetConfig:
    """Most parameters that may stay; hidden size and FFN, where not given, shrink in the same proportion to meet it."""

    num_parameters: float | None = None
    """All parameters: a number, or up to 1 a fraction of the source's."""
    num_non_embedding_parameters: float | None = None
    """The same without both embedding matrices."""


@dataclass
class DivisorsConfig:
    """Sizes that come from a ratio or a budget are multiples of these."""

    hidden_size: int = 16
    ffn_hidden_size: int = 16


@dataclass
class LayersConfig:
    """Which layers go when `target.num_layers` is smaller than the source's."""

    by: str = "block_influence"
    """block_influence; loss, accuracy or logit_mse of the model without them; removal_order (iterative logit_mse)."""
    contiguous: bool = False
    """Drop one block of neighbours, chosen as a whole."""
    drop: list[int] | None = None
    """Or just these, counted from 0."""


@dataclass
class PruneConfig:
    """What surgery cuts to."""

    student: str | None = None
    """Hugging Face directory of a smaller model to take instead of cutting the teacher; null: cut."""
    scores: str | None = None
    """Folder of scores of the same model from another run; null: those of the stage `score`."""
    target: TargetConfig = field(default_factory=TargetConfig)
    ratio: RatioConfig = field(default_factory=RatioConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    divisors: DivisorsConfig = field(default_factory=DivisorsConfig)
    layers: LayersConfig = field(default_factory=LayersConfig)
    head_residual: float = 0.0
    """Coefficient with which a pruned head's difference is added to the kept head it is paired with; 1 is the formula
    of arXiv:2407.14679, section 2.3."""


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
    eval_every_steps: int = 100
    """Steps between two looks at held-out data; 0: none."""
    eval_samples: int = 64
    """Held-out samples of each such look."""
    checkpoint_every_steps: int = 50
    """Steps between two resume checkpoints."""
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
class CorrectConfig:
    """Cross-entropy training of the teacher ("teacher correction", arXiv:2408.11796)."""

    tokens: int = 1_000_000
    """Training tokens, rounded up to whole steps."""
    snapshot_every_steps: int | None = None
    """Steps between two Hugging Face directories of the teacher on its way, for a distillation that runs meanwhile."""


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
class EvaluateConfig:
    """Loss on the held-out split, token-weighted and exact."""

    micro_batch_size: int = 16
    """Samples a forward pass."""


@dataclass
class Config:
    """The whole recipe, as in `outputs/NAME/config.yaml`."""

    name: str = "run"
    """Results go to `output_dir/name`."""
    output_dir: str = "outputs"
    seed: int = 1234
    stages: list[str] = field(default_factory=lambda: ["score", "prune", "distill", "evaluate", "report"])
    controls: list[str] = field(default_factory=list)
    """Controls to run too: ce (the pruned model trained by cross-entropy), scratch (random weights)."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    correct: CorrectConfig = field(default_factory=CorrectConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def run_dir(self) -> Path:
        """`outputs/NAME`."""
        return Path(self.output_dir) / self.name

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `config_from_dict` reads it back."""
        return dataclasses.asdict(self)
