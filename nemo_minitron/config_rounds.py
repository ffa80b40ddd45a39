"""The nodes that say what to prune to (a target, a search, rounds), and what `minitron plan` assumes."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


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
class WindowConfig:
    """Least and most that a candidate may have, both included: numbers, or up to 1 fractions of the source's."""

    min: float | None = None
    max: float | None = None


@dataclass
class ServingMemoryConfig:
    """Bytes that serving takes: the weights, and keys and values of `batch_size` sequences of `seq_length` tokens."""

    max_bytes: float | None = None
    batch_size: int = 1
    seq_length: int = 4096
    bytes_per_element: float = 2.0


@dataclass
class ServingFlopsConfig:
    """FLOPs of a token's forward pass in a sequence of `seq_length` tokens."""

    max: float | None = None
    seq_length: int = 4096


@dataclass
class LatencyConfig:
    """Milliseconds that generating takes, as the parts of a model were measured by `minitron latency`."""

    max_ms: float | None = None
    """Up to 1: a fraction of the source's."""
    table: str | None = None
    """The file that `minitron latency` wrote; it says for which batch, prompts and new tokens."""


@dataclass
class ConstraintsConfig:
    """What every candidate must meet; null bounds allow all."""

    num_parameters: WindowConfig = field(default_factory=WindowConfig)
    num_non_embedding_parameters: WindowConfig = field(default_factory=WindowConfig)
    """The same without both embedding matrices."""
    memory: ServingMemoryConfig = field(default_factory=ServingMemoryConfig)
    flops_per_token: ServingFlopsConfig = field(default_factory=ServingFlopsConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)


@dataclass
class SpaceDivisorsConfig:
    """Every candidate's sizes are multiples of these (the source's own sizes are allowed as they are)."""

    num_layers: int = 1
    hidden_size: int = 64
    ffn_hidden_size: int = 64
    num_attention_heads: int = 1
    num_query_groups: int = 1


@dataclass
class SearchConfig:
    """Architectures to choose from: the product of the lists, as far as it meets the constraints.

    An axis without a list takes every multiple of its divisor from `smallest` up to the source's size, or, where that
    is null, the source's size alone.
    """

    num_layers: list[int] = field(default_factory=list)
    hidden_size: list[int] = field(default_factory=list)
    ffn_hidden_size: list[int] = field(default_factory=list)
    ffn_expansion: list[float] = field(default_factory=list)
    """FFN widths as multiples of the hidden size, instead of `ffn_hidden_size`."""
    num_attention_heads: list[int] = field(default_factory=list)
    num_query_groups: list[int] = field(default_factory=list)
    smallest: TargetConfig = field(default_factory=TargetConfig)
    divisors: SpaceDivisorsConfig = field(default_factory=SpaceDivisorsConfig)
    constraints: ConstraintsConfig = field(default_factory=ConstraintsConfig)
    tokens: int = 0
    """Tokens that every candidate is distilled on before they are ranked, rounded up to whole steps."""
    warmup_steps: int | None = None
    """Of that short distillation; null: that of `optim`, at most a fifth of its steps."""
    looks: int = 8
    """Looks at held-out data (of `train.eval_samples`) on the way, after each of which the candidates are ranked."""
    rungs: int = 1
    """Rungs of successive halving; 1: every candidate gets all tokens. Each rung has 1 / `keep` times the steps of the
    one before, the last one all."""
    keep: float = 0.5
    """Fraction of the candidates that goes on to the next rung, at least one."""
    compare: bool = False
    """Also distil in full the candidate that was best right after pruning, where it is not the one chosen."""
    expected: TargetConfig = field(default_factory=TargetConfig)
    """The candidate that `minitron plan` goes on with, as far as it is known; null: the largest that is left."""

    def is_set(self) -> bool:
        """Whether there is anything to search."""
        return self != SearchConfig()


@dataclass
class RoundDistillConfig:
    """What a round's distillation does otherwise than `distill` and `optim`; null: the same."""

    tokens: int | None = None
    lr: float | None = None
    min_lr: float | None = None
    warmup_steps: int | None = None


@dataclass
class RoundConfig:
    """One round: a source is pruned, by a target or a search, and the student distilled."""

    name: str = MISSING
    source: str = "teacher"
    """What is scored and pruned: teacher, or the name of an earlier round, whose student it is."""
    teacher: str = "original"
    """Whose logits are distilled: original (the recipe's teacher) or source."""
    search: SearchConfig | None = None
    """Architectures to choose from (or the name of a file of conf/search); null: `target`, `ratio` or `budget`."""
    target: TargetConfig = field(default_factory=TargetConfig)
    ratio: RatioConfig = field(default_factory=RatioConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    drop: list[int] | None = None
    """Layers that go, counted from 0; null: by `prune.layers`."""
    distill: RoundDistillConfig = field(default_factory=RoundDistillConfig)


@dataclass
class BaselineConfig:
    """The model that the tokens of distillation are compared with."""

    name: str | None = None
    tokens: float | None = None
    """Tokens it was trained on from scratch."""


@dataclass
class PlanConfig:
    """What `minitron plan` assumes; nothing else reads it."""

    gpu: str = "h100_sxm"
    """h100_sxm or a100_sxm (cost/hardware.py)."""
    utilisation: float = 0.4
    """Part of the GPU's peak for GPU-hours from FLOPs alone; the published GPU-hours of Llama 2 7B and 13B
    (arXiv:2307.09288, table 2) come to 0.41 and 0.38 of an A100's."""
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    scaling: list[int] = field(default_factory=list)
    """Numbers of GPUs for a table of the fastest layout for each."""
