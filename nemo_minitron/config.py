"""The configuration: one dataclass for each node of `conf/`, with units. `compose` fills them.

Components get their own node only; the whole `Config` goes no further than the stages.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from nemo_minitron.config_rounds import (
    BudgetConfig,
    DivisorsConfig,
    LayersConfig,
    PlanConfig,
    RatioConfig,
    RoundConfig,
    SearchConfig,
    TargetConfig,
)
from nemo_minitron.config_training import (
    ALIGN_SOURCES,
    KD_LOSSES,
    AlignConfig,
    AlignPhaseConfig,
    CorrectConfig,
    DistillConfig,
    IntermediateConfig,
    IntermediateTermConfig,
    OptimConfig,
    PhaseConfig,
    ProfileConfig,
    ScratchUntilConfig,
    StopConfig,
    TeacherPlacementConfig,
    TrainConfig,
)

__all__ = [
    "ALIGN_SOURCES",
    "CONTROLS",
    "KD_LOSSES",
    "LAYER_METRICS",
    "STAGES",
    "AlignConfig",
    "AlignPhaseConfig",
    "BlendSource",
    "Config",
    "CorrectConfig",
    "DataConfig",
    "DepthConfig",
    "DistillConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "ImportanceConfig",
    "IntermediateConfig",
    "IntermediateTermConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PhaseConfig",
    "ProfileConfig",
    "PruneConfig",
    "ScratchUntilConfig",
    "StopConfig",
    "TaskConfig",
    "TeacherConfig",
    "TeacherPlacementConfig",
    "TrainConfig",
]
STAGES = ("initialize", "correct", "score", "prune", "cache_teacher", "generate", "distill", "ce",
          "scratch", "scratch_until", "align", "evaluate", "report")
CONTROLS = ("ce", "scratch", "scratch_until")
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
    """Architecture that `initialize` gives random weights, and `minitron plan` takes where no teacher is at hand."""

    family: str = "llama"
    """llama, mistral, qwen2, qwen3 or nemotron: decides norm, activation and biases."""
    num_layers: int = 6
    hidden_size: int = 192
    ffn_hidden_size: int = 512
    num_attention_heads: int = 6
    num_query_groups: int = 2
    head_dim: int = 32
    vocab_size: int = 2048
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rotary_fraction: float = 1.0
    """Part of each head that is rotated."""
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
    """corpus (the embedded sympy sources), text, indexed (.bin/.idx), chat, or auto: by what `path` is, never chat."""
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
    packing: str = "none"
    """none: the stream of tokens cut into samples, attention across documents (of chat: one conversation a sample);
    documents: whole documents side by side in a sample, attention inside each."""
    chat_template: str | None = None
    """Of chat: a file with the Jinja template that makes text of conversations; null: the tokenizer's own."""


@dataclass
class ParallelConfig:
    """How the processes share one model. World size is tp * pp * dp."""

    tp: int = 1
    """Tensor-parallel degree."""
    pp: int = 1
    """Pipeline-parallel degree."""
    dp: int = 1
    """Data-parallel degree."""
    search_groups: int = 1
    """Groups that the dp replicas are divided into for the candidates of a search: each trains others at the same time,
    with tp * pp * dp / search_groups ranks."""
    sequence_parallel: bool = False
    """Shard the norms' activations over the tensor-parallel group, along the sequence."""
    cp: int = 1
    """Context-parallel degree: only 1, the losses and the importance know no shards of a sequence."""
    interleave: int = 1
    """Model chunks a pipeline stage: only 1, the interleaved schedule is not supported."""
    distributed_optimizer: bool = False
    """Shard optimizer states over data parallelism (needs Transformer Engine or Apex to resume)."""
    read_once: bool = True
    """The first data-parallel replica reads a checkpoint and sends it to the others; false: every replica reads."""
    num_threads: int | None = None
    """CPU threads a process; null: all cores shared evenly."""
    timeout_s: int = 600
    """Longest time a collective may wait, seconds."""
    stall_s: int | None = None
    """Longest time a micro-batch may take, seconds: then every rank says where it stands, and the job fails; null:
    `timeout_s`."""


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
@dataclass
class TaskConfig:
    """A task of lm-evaluation-harness."""

    name: str = MISSING
    """lm_eval's name of a task, group or tag; with `path`, the name to show."""
    num_fewshot: int | None = None
    """Solved examples before each question; null: the task's own number, else 0."""
    path: str | None = None
    """Local file or folder of questions, of a form that evaluate/local.py tells; null: from a data set hub."""
    limit: int | None = None
    """Questions at most, of each subject of a group; null: `evaluate.limit`."""
    metric: str | None = None
    """The metric to show; null: the task's first."""


@dataclass
class ReportConfig:
    """What the page shows besides the run's own results."""

    beside: list[str] = field(default_factory=list)
    """Folders of finished runs of the same recipe, whose losses are shown beside this one's."""


@dataclass
class EvaluateConfig:
    """Loss on the held-out split, token-weighted and exact, and the tasks of lm-evaluation-harness."""

    micro_batch_size: int = 16
    """Samples a forward pass."""
    tasks: list[TaskConfig] = field(default_factory=list)
    limit: int | None = None
    """Questions at most, of each task without a limit of its own; null: all."""
    harness_dir: str | None = None
    """Folder of further YAML task files in lm_eval's form; they can name Python functions, which are run."""
    add_bos: bool | None = None
    """Put the tokenizer's bos before each prompt; null: as the tokenizer does by itself, which is lm_eval's default."""
    allow_code: bool = False
    """Run the code that the model writes, for tasks that ask for it (HumanEval, MBPP)."""
    published: list[str] = field(default_factory=list)
    """Published models whose printed scores stand beside the run's in the report; report/published.py has them."""


@dataclass
class GenerateConfig:
    """Answers of the teacher to a file of prompts (stage generate)."""

    prompts: str | None = None
    """JSON lines with `prompt` (text) or `messages` (a chat, whose template the tokenizer has)."""
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: the likeliest token each time."""
    top_p: float = 1.0
    stop: list[str] = field(default_factory=list)
    """Texts that end an answer, besides the end-of-sequence token; they are not part of it."""
    micro_batch_size: int = 16
    """Prompts a forward pass."""


@dataclass
class JobConfig:
    """One Slurm job of a recipe's chain."""

    stages: list[str] = MISSING
    """Stages and controls of the recipe that it runs."""
    overrides: list[str] = field(default_factory=list)
    """Hydra overrides of this job alone: its layout (`parallel.tp=8`), nodes or time limit."""


@dataclass
class ClusterConfig:
    """How processes are started, and what is asked of Slurm. No result depends on it."""

    launcher: str = "auto"
    """local (torchrun on this machine), srun (inside an allocation), or auto: srun where there is an allocation."""
    account: str | None = None
    partition: str | None = None
    nodes: int | None = None
    """null: as many as the layout needs."""
    gpus_per_node: int = 0
    """GPUs of each node, a rank each; 0: ranks compute on CPU."""
    processes_per_node: int | None = None
    """Ranks on each node; null: `gpus_per_node`, or all ranks on one node where that is 0."""
    cpus_per_task: int | None = None
    """CPUs bound to each rank; null: Slurm's own default."""
    time_limit: str | None = None
    """Of each job, in Slurm's form (D-HH:MM:SS); null: the partition's default."""
    grace_s: int = 180
    """Seconds before the time limit at which ranks are told to write a resume point; 0: they are not told."""
    requeue: bool = True
    """Put a job that was stopped by a signal, or lost a node, back into the queue."""
    max_restarts: int = 100
    """After so many restarts a stopped job is not put back."""
    container: str | None = None
    """Image for Pyxis (`--container-image`): a .sqsh file or a registry's name; null: no container."""
    mounts: list[str] = field(default_factory=list)
    """SOURCE:TARGET[:ro] folders inside the container; the checkout and `output_dir` are added."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch, as they are."""
    srun: list[str] = field(default_factory=list)
    """Further options of srun, as they are."""
    environment: dict[str, str] = field(default_factory=dict)
    """Set for every rank. Not for secrets: those pass through from the submitting shell."""
    jobs: list[JobConfig] = field(default_factory=list)
    """The recipe as a chain of dependent jobs; empty: one job."""
    search_array: int | None = None
    """Tasks of a job array, one a candidate, that train the candidates of a search at the same time; 0: all of them;
    null: the search runs within its job."""


@dataclass
class Config:
    """The whole recipe, as in `outputs/NAME/config.yaml`."""

    name: str = "run"
    """Results go to `output_dir/name`."""
    output_dir: str = "outputs"
    seed: int = 1234
    stages: list[str] = field(default_factory=lambda: ["score", "prune", "distill", "evaluate", "report"])
    controls: list[str] = field(default_factory=list)
    """Controls to run too: ce (the pruned model trained by cross-entropy), scratch (random weights), scratch_until."""
    only: list[str] = field(default_factory=list)
    """Of stages and controls, the ones to run now (a job of a chain); empty: all."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    rounds: list[RoundConfig] = field(default_factory=list)
    """In the order in which they run; none: one round, by `prune`, `search` and `distill`."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    correct: CorrectConfig = field(default_factory=CorrectConfig)
    scratch_until: ScratchUntilConfig = field(default_factory=ScratchUntilConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    align: AlignConfig = field(default_factory=AlignConfig)

    @property
    def run_dir(self) -> Path:
        """`outputs/NAME`."""
        return Path(self.output_dir) / self.name

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `config_from_dict` reads it back."""
        return dataclasses.asdict(self)
