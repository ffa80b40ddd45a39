"""From YAML files and overrides to a checked `Config`.

`load_config` composes `conf/config.yaml` with an experiment and overrides through Hydra's compose API and
merges the result into the dataclasses of `config`: an unknown key or a wrong type is a `ConfigError`.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from pathlib import Path
from typing import Any

from nemo_minitron.config import (
    ALIGN_SOURCES,
    CONTROLS,
    KD_LOSSES,
    LAYER_METRICS,
    STAGES,
    AlignConfig,
    ClusterConfig,
    Config,
    DistillConfig,
    EvaluateConfig,
    GenerateConfig,
    OptimConfig,
    TrainConfig,
)
from nemo_minitron.config_rounds import RoundConfig
from nemo_minitron.errors import ConfigError

_JOB_STAGES = (*STAGES, "search", "compare")
"""What one job of a chain may be: also those that no recipe lists, since they follow from `search`."""


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
    return config_from_dict(_with_named_searches(composed))


def _with_named_searches(composed: Any) -> Any:
    """In `rounds`, the name of a file of conf/search in place of a search space becomes what the file says."""
    from omegaconf import OmegaConf

    for round_ in composed.get("rounds") or ():
        name = round_.get("search") if isinstance(round_, dict) else None
        if isinstance(name, str):
            path = conf_dir() / "search" / f"{name}.yaml"
            if not path.is_file():
                known = ", ".join(sorted(found.stem for found in path.parent.glob("*.yaml")))
                raise ConfigError("unknown search", expected=known, found=repr(name), key="rounds.search")
            round_["search"] = OmegaConf.to_container(OmegaConf.load(path))
    return composed


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
    if unknown := [value for value in config.only if value not in _JOB_STAGES]:
        raise ConfigError("unknown entry in only", expected=", ".join(_JOB_STAGES), found=", ".join(unknown),
                          key="only")
    choices: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("data.kind", config.data.kind, ("auto", "corpus", "text", "indexed", "chat")),
        ("data.packing", config.data.packing, ("none", "documents")),
        ("align.packing", config.align.packing, ("none", "documents")),
        ("align.source", config.align.source, ALIGN_SOURCES),
        ("cluster.launcher", config.cluster.launcher, ("auto", "local", "srun")),
        ("importance.method", config.importance.method, ("activations", "magnitude", "random")),
        ("importance.batch", config.importance.batch, ("mean", "l2", "var")),
        ("importance.sequence", config.importance.sequence, ("mean", "l2", "var")),
        ("importance.neurons", config.importance.neurons, ("post_activation", "pre_activation")),
        ("importance.heads", config.importance.heads, ("channels", "tokens")),
        ("importance.ranking", config.importance.ranking, ("per_layer", "summed")),
        ("prune.layers.by", config.prune.layers.by, LAYER_METRICS),
        ("distill.cache_dtype", config.distill.cache_dtype, ("float16", "float32")),
        ("distill.loss", config.distill.loss, KD_LOSSES),
        ("distill.teacher.precision", config.distill.teacher.precision or "32", ("32", "bf16", "fp8")),
        ("train.not_finite", config.train.not_finite, ("stop", "skip")),
        ("train.precision", config.train.precision, ("32", "bf16-mixed")),
        ("train.recompute", config.train.recompute, ("none", "selective", "full")),
        ("train.last_batch", config.train.last_batch, ("full", "partial")),
        ("plan.gpu", config.plan.gpu, ("h100_sxm", "a100_sxm")),
    )
    choices += tuple(("importance.depth.metrics", value, ("loss", "accuracy", "logit_mse"))
                     for value in config.importance.depth.metrics)
    choices += tuple(("train.loggers", value, ("wandb", "mlflow")) for value in config.train.loggers)
    choices += tuple(("importance.norms", value, ("input", "pre_mlp", "final")) for value in config.importance.norms)
    for key, value, choice in choices:
        if value not in choice:
            raise ConfigError("bad value", expected=", ".join(choice), found=repr(value), key=key)
    positive = {
        "parallel": ("tp", "pp", "dp", "search_groups", "timeout_s", "stall_s"),
        "data": ("seq_length",),
        "importance": ("num_samples", "micro_batch_size", "iterations"),
        "importance.depth": ("num_samples",),
        "prune.divisors": ("hidden_size", "ffn_hidden_size"),
        "train": ("global_batch_size", "micro_batch_size", "log_every_steps", "checkpoint_every_steps",
                  "eval_samples", "chunk_tokens"),
        "train.profile": ("first_step", "num_steps"),
        "train.stop": ("tokens", "steps"),
        "distill.teacher": ("tp", "pp", "exchange_every_steps"),
        "distill.intermediate": ("relation_heads",),
        "evaluate": ("micro_batch_size",),
        "generate": ("micro_batch_size", "max_new_tokens"),
        "correct": ("tokens", "snapshot_every_steps"),
        "distill": ("tokens", "top_k"),
    }
    for node, names in positive.items():
        for name in names:
            value = operator.attrgetter(f"{node}.{name}")(config)
            if value is not None and value < 1:
                raise ConfigError("bad value", expected="a positive number", found=str(value), key=f"{node}.{name}")
    not_negative = {
        "optim": tuple(field.name for field in dataclasses.fields(OptimConfig)),
        "train": ("eval_every_steps",),
        "distill": ("kd_weight", "ce_weight"),
        "search": ("tokens",),
    }
    for node, names in not_negative.items():
        for name in names:
            value = getattr(getattr(config, node), name)
            if not value >= 0:  # NaN is not
                raise ConfigError("bad value", expected="zero or more", found=str(value), key=f"{node}.{name}")
    _check_distill(config.distill, config.train)
    _check_rounds(config)
    for name, meaning in (("cp", "context parallelism"), ("interleave", "the interleaved pipeline schedule")):
        if (value := getattr(config.parallel, name)) != 1:
            raise ConfigError(f"{meaning} is not supported", expected="1", found=str(value), key=f"parallel.{name}")
    if config.parallel.dp % config.parallel.search_groups:
        raise ConfigError("groups of a search are whole replicas", expected=f"a divisor of parallel.dp, "
                          f"{config.parallel.dp}", found=str(config.parallel.search_groups),
                          key="parallel.search_groups")
    for asks, key in ((config.train.keep_best, "train.keep_best"),
                      (config.train.stop.heldout_ce is not None, "train.stop.heldout_ce"),
                      ("scratch_until" in config.controls, "controls")):
        if asks and not config.train.eval_every_steps:
            raise ConfigError("no looks at held-out data to decide by", expected="train.eval_every_steps of 1 or more",
                              found="0", key=key)
    if config.scratch_until.max_ratio <= 0:
        raise ConfigError("bad value", expected="a positive number", found=str(config.scratch_until.max_ratio),
                          key="scratch_until.max_ratio")
    _check_cluster(config.cluster)
    _check_tasks(config.evaluate)
    _check_generate(config.generate)
    _check_align(config.align)
    if not config.name or "/" in config.name or config.name.startswith("."):
        raise ConfigError("bad run name", expected="a plain folder name", found=repr(config.name), key="name")


_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL", re.IGNORECASE)


def _check_cluster(cluster: ClusterConfig) -> None:
    """Sizes that are none, and secrets, which would be written beside every result."""
    for name in ("nodes", "processes_per_node", "cpus_per_task"):
        value = getattr(cluster, name)
        if value is not None and value < 1:
            raise ConfigError("bad value", expected="a positive number or null", found=str(value),
                              key=f"cluster.{name}")
    for name in ("gpus_per_node", "grace_s", "max_restarts", "search_array"):
        if (getattr(cluster, name) or 0) < 0:
            raise ConfigError("bad value", expected="zero or more", found=str(getattr(cluster, name)),
                              key=f"cluster.{name}")
    secret = [name for name in cluster.environment if _SECRET.search(name)]
    if secret:
        raise ConfigError("a secret does not belong in a recipe, which is written beside every result",
                          expected="it in the environment of the shell that submits, which is passed on",
                          found=", ".join(secret), key="cluster.environment")
    for job in cluster.jobs:
        unknown = [stage for stage in job.stages if stage not in _JOB_STAGES]
        if unknown or not job.stages:
            raise ConfigError("a job of unknown stages", expected=", ".join(_JOB_STAGES),
                              found=", ".join(unknown) or "none", key="cluster.jobs")


def _check_distill(distill: DistillConfig, train: TrainConfig) -> None:
    temperature = distill.temperature
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError("bad value", expected="a positive number", found=str(temperature), key="distill.temperature")
    if temperature != 1 and distill.loss in ("mse", "cosine", "top_k_kl"):
        raise ConfigError("a loss without temperature", expected="1, or kl, reverse_kl or js as distill.loss",
                          found=f"{temperature} with {distill.loss}", key="distill.temperature")
    if distill.cached and distill.loss != "top_k_kl":
        raise ConfigError("a cache holds the likeliest tokens only", expected="distill.loss=top_k_kl",
                          found=distill.loss, key="distill.loss or distill.cached")
    if distill.cached and (distill.intermediate.terms or distill.phases or distill.teacher.snapshots):
        raise ConfigError("a cache holds one teacher's logits of samples of one length", key="distill.cached",
                          expected="no distill.intermediate.terms, distill.phases or distill.teacher.snapshots",
                          found="some of them")
    alpha = distill.intermediate.alpha
    if alpha is not None and not (alpha >= 0 and math.isfinite(alpha)):
        raise ConfigError("bad value", expected="zero or more, or null", found=str(alpha),
                          key="distill.intermediate.alpha")
    states = {term.state for term in distill.intermediate.terms}
    if states and (train.recompute == "full" or (train.recompute == "selective" and "attention" in states)):
        raise ConfigError("intermediate losses cannot be in what is computed again", key="train.recompute",
                          expected="none (selective goes with all states but attention)", found=train.recompute)


def _check_rounds(config: Config) -> None:
    """Names that are unlike, sources that exist, and one way to say what each round prunes to."""
    names: list[str] = []
    for index, round_ in enumerate(config.rounds):
        key = f"rounds[{index}]"
        if not round_.name or "/" in round_.name or round_.name.startswith(".") or round_.name in ("teacher", *names):
            raise ConfigError("bad name of a round", expected="a plain folder name that no other round has",
                              found=repr(round_.name), key=f"{key}.name")
        if round_.source not in ("teacher", *names):
            raise ConfigError("a round whose source does not exist", found=repr(round_.source), key=f"{key}.source",
                              expected=" or ".join(["teacher", *names]))
        if round_.teacher not in ("original", "source"):
            raise ConfigError("bad value", expected="original, source", found=repr(round_.teacher),
                              key=f"{key}.teacher")
        names.append(round_.name)
        _check_round_target(round_, key)
        for name, value in dataclasses.asdict(round_.distill).items():
            if value is not None and not (value > 0 if name == "tokens" else value >= 0):
                raise ConfigError("bad value", expected="a positive number", found=str(value),
                                  key=f"{key}.distill.{name}")
    shared = [name for name in ("target", "ratio", "budget") if any(dataclasses.asdict(getattr(config.prune,
                                                                                              name)).values())]
    if config.search.is_set():
        shared.append("search")
    if config.rounds and shared:
        raise ConfigError("a target beside rounds", expected="each round to have its own", found=", ".join(shared),
                          key=" and ".join(name if name == "search" else f"prune.{name}" for name in shared))


def _check_round_target(round_: RoundConfig, key: str) -> None:
    given = [name for name in ("target", "ratio", "budget")
             if any(value is not None for value in dataclasses.asdict(getattr(round_, name)).values())]
    given += ["drop"] if round_.drop is not None else []
    if round_.search is not None and given:
        raise ConfigError("a target beside a search", expected="one of them", found=f"search and {', '.join(given)}",
                          key=f"{key}.search")
    if round_.search is None and not given:
        raise ConfigError("a round without a target", expected="search, target, ratio, budget or drop",
                          found="none of them", key=f"{key}.target")


def _check_tasks(evaluate: EvaluateConfig) -> None:
    if evaluate.limit is not None and evaluate.limit < 1:
        raise ConfigError("bad value", expected="a positive number", found=str(evaluate.limit), key="evaluate.limit")
    for at, task in enumerate(evaluate.tasks):
        for name in ("num_fewshot", "limit"):
            value = getattr(task, name)
            if value is not None and value < (1 if name == "limit" else 0):
                raise ConfigError("bad value", expected="a positive number" if name == "limit" else "zero or more",
                                  found=str(value), key=f"evaluate.tasks[{at}].{name}")


def _check_generate(generate: GenerateConfig) -> None:
    if not (generate.temperature >= 0 and math.isfinite(generate.temperature)):
        raise ConfigError("bad value", expected="zero or more", found=str(generate.temperature),
                          key="generate.temperature")
    if not 0 < generate.top_p <= 1:
        raise ConfigError("bad value", expected="more than 0, at most 1", found=str(generate.top_p),
                          key="generate.top_p")


def _check_align(align: AlignConfig) -> None:
    """Names that are folders, sources that are known, and sizes that are some."""
    names: list[str] = []
    for number, phase in enumerate(align.phases):
        key = f"align.phases[{number}]"
        bad = not phase.name or "/" in phase.name or phase.name.startswith(".") or phase.name in (
            "checkpoint", "tensorboard", *names)
        if bad:
            raise ConfigError("bad name of a phase", expected="a plain folder name that no other phase has",
                              found=repr(phase.name), key=f"{key}.name")
        if phase.source not in ALIGN_SOURCES:
            raise ConfigError("bad value", expected=", ".join(ALIGN_SOURCES), found=repr(phase.source),
                              key=f"{key}.source")
        names.append(phase.name)
    for key, node in [("align", align), *((f"align.phases[{at}]", phase) for at, phase in enumerate(align.phases))]:
        for name in ("tokens", "seq_length", "global_batch_size", "micro_batch_size"):
            if (size := getattr(node, name)) is not None and size < 1:
                raise ConfigError("bad value", expected="a positive number", found=str(size), key=f"{key}.{name}")
        for name in ("lr", "min_lr", "warmup_steps"):
            if (rate := getattr(node, name)) is not None and not rate >= 0:
                raise ConfigError("bad value", expected="zero or more", found=str(rate), key=f"{key}.{name}")


def _first_lines(error: Exception) -> str:
    """The telling lines of a Hydra or OmegaConf message, without its object dump."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines[:3] if not line.startswith(("object_type", "full_key", "reference_type")))
