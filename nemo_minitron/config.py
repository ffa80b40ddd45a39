"""The configuration: one dataclass for each node of `conf/`, with units, and how it is composed.

`load_config` composes `conf/config.yaml` with an experiment and overrides through Hydra's compose API,
merges the result into these dataclasses (an unknown key or a wrong type is a `ConfigError`) and returns
them. Components get their own node only; the whole `Config` goes no further than the stages.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.errors import ConfigError

STAGES = ("initialize", "correct", "score", "prune", "distill", "ce", "scratch", "evaluate", "report")
CONTROLS = ("ce", "scratch")


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
class DataConfig:
    """Text or tokens, cut into samples of `seq_length` tokens, each with an id."""

    kind: str = "auto"
    """corpus (the embedded sympy sources), text, indexed (.bin/.idx), or auto: by what `path` is."""
    path: str | None = None
    """A text file, a folder of text files, or the prefix of a .bin/.idx pair; null means corpus."""
    separator: str | None = None
    """String between documents inside a text file; null: each file is one document."""
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
    distributed_optimizer: bool = False
    """Shard optimizer states over data parallelism (needs Transformer Engine or Apex to resume)."""
    num_threads: int | None = None
    """CPU threads a process; null: all cores shared evenly."""
    timeout_s: int = 600
    """Longest time a collective may wait, seconds."""


@dataclass
class ImportanceConfig:
    """Importance from activations (arXiv:2407.14679, section 2.2)."""

    num_samples: int = 1024
    """Calibration samples."""
    micro_batch_size: int = 8
    """Samples a forward pass."""
    batch: str = "l2"
    """Aggregation over samples: mean, l2 or var."""
    sequence: str = "mean"
    """Aggregation over a sample's tokens: mean (of absolute values), l2 or var."""


@dataclass
class TargetConfig:
    """Sizes after pruning; null keeps the source's."""

    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None


@dataclass
class PruneConfig:
    """What surgery cuts to."""

    target: TargetConfig = field(default_factory=TargetConfig)


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


@dataclass
class CorrectConfig:
    """Cross-entropy training of the teacher ("teacher correction", arXiv:2408.11796)."""

    tokens: int = 1_000_000
    """Training tokens, rounded up to whole steps."""


@dataclass
class DistillConfig:
    """Recovery of the pruned model; the controls train on the same number of tokens."""

    tokens: int = 1_000_000
    """Training tokens, rounded up to whole steps."""
    kl_weight: float = 1.0
    """Weight of KL(teacher || student), nats/token."""
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


def conf_dir() -> Path:
    """The folder of the YAML files: beside the package in a checkout, inside it when installed as a wheel."""
    package = Path(__file__).resolve().parent
    beside = package.parent / "conf"
    return beside if (beside / "config.yaml").exists() else package / "conf"


def shipped_model(name: str) -> str:
    """Path of a checkpoint that comes with the project (`${shipped:NAME}` in the YAML files)."""
    return str(conf_dir().parent / "models" / name)


def load_config(overrides: list[str]) -> Config:
    """Compose `conf/config.yaml` with Hydra overrides such as `experiment=demo` or `parallel.tp=2`.

    Raises:
        ConfigError: for an unknown group, key or value, with Hydra's own first line of explanation.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _check_overrides(overrides)
    OmegaConf.register_new_resolver("shipped", shipped_model, replace=True)
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            composed = OmegaConf.to_container(compose("config", overrides=overrides), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError("the configuration cannot be composed", found=_first_lines(error)) from None
    return config_from_dict(composed)


def _check_overrides(overrides: list[str]) -> None:
    """Name the override that is at fault where Hydra would not: bad syntax, a group's member that does not exist."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            raise ConfigError("not an override", expected="key=value in Hydra's syntax", found=repr(text)) from None
        name, group = override.key_or_group, conf_dir() / override.key_or_group
        if not name:
            raise ConfigError("not an override", expected="key=value", found=repr(text))
        if group.is_dir() and not (group / f"{override.value()}.yaml").is_file():
            known = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
            raise ConfigError(f"unknown {name}", expected=known, found=repr(override.value()), key=name)


def config_from_dict(data: Any) -> Config:
    """Check plain data against the dataclasses above and return them; `ConfigError` says which key is wrong."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), data))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "") or ""
        raise ConfigError("bad configuration", found=_first_lines(error), key=key) from None
    assert isinstance(config, Config)
    _check(config)
    return config


def _check(config: Config) -> None:
    for name, allowed in (("stages", STAGES), ("controls", CONTROLS)):
        unknown = [value for value in getattr(config, name) if value not in allowed]
        if unknown:
            raise ConfigError(f"unknown entry in {name}", expected=", ".join(allowed), found=", ".join(unknown),
                              key=name)
    choices = (
        ("data.kind", config.data.kind, ("auto", "corpus", "text", "indexed")),
        ("importance.batch", config.importance.batch, ("mean", "l2", "var")),
        ("importance.sequence", config.importance.sequence, ("mean", "l2", "var")),
        ("train.precision", config.train.precision, ("32", "bf16-mixed")),
    )
    for key, value, choice in choices:
        if value not in choice:
            raise ConfigError("bad value", expected=", ".join(choice), found=repr(value), key=key)
    positive = {
        "parallel": ("tp", "pp", "dp", "timeout_s"),
        "data": ("seq_length",),
        "importance": ("num_samples", "micro_batch_size"),
        "train": ("global_batch_size", "micro_batch_size", "log_every_steps", "checkpoint_every_steps",
                  "eval_samples", "chunk_tokens"),
        "evaluate": ("micro_batch_size",),
        "correct": ("tokens",),
        "distill": ("tokens",),
    }
    for node, names in positive.items():
        for name in names:
            value = getattr(getattr(config, node), name)
            if value < 1:
                raise ConfigError("bad value", expected="a positive number", found=str(value), key=f"{node}.{name}")
    not_negative = {
        "optim": tuple(field.name for field in dataclasses.fields(OptimConfig)),
        "train": ("eval_every_steps",),
        "distill": ("kl_weight", "ce_weight"),
    }
    for node, names in not_negative.items():
        for name in names:
            value = getattr(getattr(config, node), name)
            if not value >= 0:  # NaN is not
                raise ConfigError("bad value", expected="zero or more", found=str(value), key=f"{node}.{name}")
    if not config.name or "/" in config.name or config.name.startswith("."):
        raise ConfigError("bad run name", expected="a plain folder name", found=repr(config.name), key="name")


def _first_lines(error: Exception) -> str:
    """The telling lines of a Hydra or OmegaConf message, without its object dump."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines[:3] if not line.startswith(("object_type", "full_key", "reference_type")))
