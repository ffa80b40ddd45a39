"""The stages: what each needs, what of the recipe it depends on, and the function that runs it.

The functions are named, not imported: the command's own process decides what is due without importing
Megatron or NeMo.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from nemo_minitron.artifacts import Manifest, digest_files, digest_json
from nemo_minitron.checkpoint.digest import read_checkpoint
from nemo_minitron.data.source import resolve_kind, source_digest
from nemo_minitron.errors import ConfigError
from nemo_minitron.evaluate.tasks import task_key
from nemo_minitron.importance.scores import scores_digest
from nemo_minitron.report.summary import MODELS
from nemo_minitron.stages.aligning import MODEL, align_inputs, what_is_tuned_on
from nemo_minitron.stages.context import Context

TEACHER = "teacher"
"""Stands for the weights that are distilled from among a stage's inputs."""
SOURCE = "source"
"""And this for the weights that are scored and pruned."""


class StageFunction(Protocol):
    """A stage: reads artifacts, writes its own, and returns the small facts that go into its manifest."""

    def __call__(self, context: Context) -> dict[str, Any]:
        """Run it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    `inputs` are stages (or TEACHER or SOURCE) whose results it reads; optional ones count where they are current.
    `config` are the nodes of the recipe its result depends on. `ranks`: every rank runs it, not rank 0 alone.
    `keeps_files` spares its directory when the inputs change. `products` are files of the run that it makes.
    """

    function: str
    inputs: tuple[str, ...] = ()
    optional_inputs: tuple[str, ...] = ()
    config: tuple[str, ...] = ()
    ranks: bool = True
    keeps_files: bool = False
    products: tuple[str, ...] = ()

    def load(self) -> StageFunction:
        """Import the function."""
        module, name = self.function.split(":")
        function: StageFunction = getattr(import_module(f"nemo_minitron.stages.{module}"), name)
        return function


_TRAINING = ("data", "optim", "train", "seed")

STAGES: dict[str, Stage] = {
    "initialize": Stage(function="initialize:run", config=("model", "data", "seed"), ranks=False),
    "correct": Stage(function="correct:run", inputs=("start",), config=(*_TRAINING, "correct")),
    "score": Stage(function="score:run", inputs=(SOURCE,), config=("importance", "data", "seed")),
    "search": Stage(function="search:run", inputs=(TEACHER, SOURCE, "score"), keeps_files=True,
                    config=(*_TRAINING, "distill", "prune", "importance", "search")),
    "prune": Stage(function="prune:run", inputs=(SOURCE, "score"), config=("prune", "importance"), ranks=False),
    "cache_teacher": Stage(function="cache_teacher:run", inputs=(TEACHER,), config=(*_TRAINING, "distill")),
    "generate": Stage(function="generate:run", inputs=(TEACHER,), config=("generate", "seed")),
    "distill": Stage(function="distill:run", inputs=(TEACHER, "prune"), config=(*_TRAINING, "distill")),
    "ce": Stage(function="controls:run_ce", inputs=("prune",), config=(*_TRAINING, "distill")),
    "scratch": Stage(function="controls:run_scratch", inputs=("prune",), config=(*_TRAINING, "distill")),
    "scratch_until": Stage(function="controls:run_scratch_until", inputs=("prune", "distill"),
                           config=(*_TRAINING, "scratch_until")),
    "align": Stage(function="align:run", config=("optim", "train", "seed", "align")),
    "compare": Stage(function="compare:run", inputs=(TEACHER, SOURCE, "score", "search"), keeps_files=True,
                     config=(*_TRAINING, "distill", "prune", "importance")),
    "evaluate": Stage(function="evaluate:run", inputs=(TEACHER,), config=("data", "evaluate"), keeps_files=True,
                      optional_inputs=("prune", "distill", "ce", "scratch", "scratch_until", "align")),
    "report": Stage(function="report:run", inputs=("evaluate",), config=("evaluate", "report"), ranks=False,
                    keeps_files=True, products=("summary.json", "report.html"),
                    optional_inputs=("score", "search", "prune", "distill", "ce", "scratch", "scratch_until", "align",
                                     "compare", "correct")),
}
"""In the order in which they run."""

_WITHOUT_EFFECT = ("log_every_steps", "loggers", "checkpoint_every_steps", "checkpoint_async", "not_finite", "profile",
                   "peak_tflops", "recompute")
"""Keys of `train` that change what is printed and saved on the way, or how it is computed, not the result."""

_LOOKS = ("eval_every_steps", "eval_samples")
"""Keys of `train` that change the result only where a look decides on it, or where the looks are the result."""


def wanted_stages(context: Context) -> list[str]:
    """The recipe's stages and controls, in the order in which they run."""
    wanted = {*context.config.stages, *context.config.controls}
    if context.config.prune.scores is not None or context.config.prune.student is not None:
        wanted.discard("score")
    if context.config.search.is_set():
        wanted |= {"search"} if "prune" in wanted else set()
        wanted |= {"compare"} if "distill" in wanted and context.config.search.compare else set()
    return [stage for stage in STAGES if stage in wanted and stage not in context.elsewhere]


def asked_stages(context: Context) -> list[str]:
    """Those of the wanted stages that are to run now: all, or a job's part of a chain of jobs."""
    only = context.config.only
    return [stage for stage in wanted_stages(context) if not only or stage in only]


def stage_config(context: Context, stage: str) -> dict[str, Any]:
    """The part of the recipe that the stage's result depends on."""
    part = context.config_part(*STAGES[stage].config)
    if "train" in part:
        train = part["train"]
        decide = (train["keep_best"] or train["stop"]["heldout_ce"] is not None or stage == "scratch_until"
                  or context.looks_count)
        unused = _WITHOUT_EFFECT if decide else (*_WITHOUT_EFFECT, *_LOOKS)
        eval_samples = train["eval_samples"]
        part["train"] = {key: value for key, value in part["train"].items() if key not in unused}
        if stage == "search":  # how often its candidates are looked at is `search.looks`
            part["train"] = {**part["train"], "eval_samples": eval_samples}
            part["train"].pop("eval_every_steps", None)
    if "data" in part:
        part["data"] = _what_is_read(part["data"])
    if stage == "evaluate":
        evaluate = context.config.evaluate
        part["evaluate"] = [[task_key(task, evaluate, context.config.seed), task.metric] for task in evaluate.tasks]
    if stage == "report":
        part["evaluate"] = {"published": part["evaluate"]["published"]}
        others = [[run, digest_files([Path(run) / "summary.json"])] for run in part["report"]["beside"]]
        part["report"] = {"beside": others}
    if stage == "generate":
        prompts = Path(part["generate"]["prompts"] or "")
        part["generate"]["prompts"] = digest_files([prompts]) if prompts.is_file() else str(prompts)
        part["generate"].pop("micro_batch_size")
    if stage == "score":
        part["importance"] = _what_is_collected(part["importance"])
        if context.config.importance.iterations > 1:
            part |= {"ranking": _how_it_is_ranked(context), "prune": context.config_part("prune")["prune"]}
    if stage in ("search", "compare"):
        part["importance"] = _how_it_is_ranked(context)
        part["prune"].pop("scores")
        part["distill"].pop("cache")
        part["distill"]["teacher"] = {"precision": part["distill"]["teacher"]["precision"]}
    if stage == "search":
        part["distill"] = {key: value for key, value in part["distill"].items() if key not in ("tokens", "phases")}
        part["search"] = {key: value for key, value in part["search"].items() if key not in ("expected", "compare")}
        latency = part["search"]["constraints"]["latency"]
        if latency["table"] is not None:
            latency["table"] = digest_files([Path(latency["table"])])
    if stage == "prune":
        part["importance"] = _how_it_is_ranked(context)
        part["prune"].pop("scores")
        if part["prune"].pop("student") is not None:
            part = {"student": True}
    if stage == "cache_teacher":
        part.pop("optim")
        part["train"] = {key: part["train"][key] for key in ("global_batch_size", "precision")}
        precision = part["distill"]["teacher"]["precision"]
        part["distill"] = {key: part["distill"][key] for key in ("tokens", "top_k", "cache_dtype")}
        part["distill"]["teacher_precision"] = precision
    if stage == "correct":
        part["correct"].pop("snapshot_every_steps")
    if stage == "distill":
        part["distill"].pop("cache")
        part["distill"]["teacher"] = {key: part["distill"]["teacher"][key]
                                      for key in ("precision", "snapshots", "exchange_every_steps")}
        if not part["distill"]["cached"]:
            part["distill"].pop("cache_dtype")
        if part["distill"]["loss"] != "top_k_kl":
            part["distill"].pop("top_k")
    if stage == "align":  # sizes and learning rate are those of its trainings
        part["align"] = what_is_tuned_on(context.config)
        part["optim"] = _without(part["optim"], "lr", "min_lr", "warmup_steps")
        part["train"] = _without(part["train"], "global_batch_size", "micro_batch_size")
    if stage in ("ce", "scratch"):
        part["distill"] = {key: part["distill"][key] for key in ("tokens", "phases")}
    return part


def _without(node: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key not in names}


def _what_is_read(data: dict[str, Any]) -> dict[str, Any]:
    """A node of data with digests in the place of paths; without the later keys where they have no effect."""
    kind, path, template = data["kind"], data.pop("path"), data.pop("chat_template")
    data |= {"kind": resolve_kind(kind, path), "digest": source_digest(kind, path)}
    for source in data["blend"]:
        found = source.pop("path")
        source |= {"kind": resolve_kind(kind, found), "digest": source_digest(kind, found)}
    if data["packing"] == "none":
        data.pop("packing")
    if template is not None and Path(template).is_file():
        data["chat_template"] = digest_files([Path(template)])
    return data


def _what_is_collected(importance: dict[str, Any]) -> dict[str, Any]:
    """The part of `importance` that a score file depends on; what only aggregates it is left out."""
    if importance["method"] != "activations":
        return {"method": importance["method"]}
    collected = {key: importance[key] for key in ("method", "num_samples", "neurons", "heads", "iterations", "depth")}
    depth = dict(collected["depth"])
    if depth["task"] is not None and Path(depth["task"]).is_file():
        depth["task"] = digest_files([Path(depth["task"])])
    return {**collected, "depth": depth}


def _how_it_is_ranked(context: Context) -> dict[str, Any]:
    importance = context.config_part("importance")["importance"]
    return {key: importance[key] for key in ("method", "batch", "sequence", "norms", "ranking", "iterations")}


def needed_inputs(context: Context, stage: str) -> tuple[str, ...]:
    """The inputs that must be there; of `prune` also what a search chose, where the recipe has one.

    Those of `align` are the recipe's choice.
    """
    if stage == "align":
        return align_inputs(context.config)
    searched = ("search",) if stage == "prune" and context.config.search.is_set() else ()
    return (*STAGES[stage].inputs, *searched)


def input_digests(context: Context, stage: str) -> dict[str, str] | None:
    """Digest of every input by name, or None where one is not there yet."""
    digests: dict[str, str] = {}
    needed = needed_inputs(context, stage)
    for name in (*needed, *STAGES[stage].optional_inputs):
        digest: str | None
        if name in (TEACHER, SOURCE, "start"):
            digest = _model_digest(context, name)
        elif name == MODEL:
            digest = outside_digest(Path(context.config.align.model))
        elif name == "score" and context.config.prune.student is not None:
            digest = outside_digest(Path(context.config.prune.student))
        elif name == "score" and context.config.prune.scores is not None:
            digest = scores_digest(Path(context.config.prune.scores))
        else:
            stale = name in STAGES[stage].optional_inputs and not is_current(context, name)
            manifest = None if stale else context.manifest(name)
            digest = None if manifest is None else digest_json([manifest.fingerprint, manifest.result])
        if digest is None:
            if name in needed:
                return None
            continue
        digests[name] = digest
    return digests


def fingerprint(context: Context, stage: str, inputs: dict[str, str]) -> str:
    """What the stage's result is a function of: its name, inputs and configuration, not the layout."""
    return digest_json({"stage": stage, "inputs": inputs, "config": stage_config(context, stage)})


def is_done(context: Context, stage: str) -> bool:
    """Whether the stage's manifest is there and belongs to today's inputs and configuration."""
    manifest = context.manifest(stage)
    inputs = input_digests(context, stage)
    if not all((context.config.run_dir / name).exists() for name in STAGES[stage].products):
        return False
    return manifest is not None and inputs is not None and manifest.fingerprint == fingerprint(context, stage, inputs)


def is_current(context: Context, stage: str) -> bool:
    """Whether the stage and all that it was made from are done: no control of an earlier target, say."""
    return is_done(context, stage) and all(is_current(context, name) for name in _stage_inputs(context, stage))


def models_there(context: Context) -> dict[str, Path]:
    """Directories of the models that there are by now: the teacher, and those that this very recipe has made."""
    found = {"teacher": context.teacher_path()}
    done = {name: stage for name, stage in MODELS.items() if is_current(context, stage)}
    return found | {name: context.stage_dir(stage) / "checkpoint" for name, stage in done.items()}


def _stage_inputs(context: Context, stage: str) -> list[str]:
    """The inputs that are stages of this run: not scores that come from elsewhere."""
    prune = context.config.prune
    elsewhere = {"score"} if prune.scores is not None or prune.student is not None else set()
    return [name for name in needed_inputs(context, stage) if name in STAGES and name not in elsewhere]


def due_stages(context: Context) -> list[str]:
    """Which of the wanted stages have to run: those not done, and those that read a result that will be made anew."""
    due: list[str] = []
    for stage in wanted_stages(context):
        sources = [*needed_inputs(context, stage), *STAGES[stage].optional_inputs]
        if {TEACHER, SOURCE, "start"} & set(sources):
            sources += ["initialize"] if "start" in sources else ["correct", "initialize"]
        if any(source in due for source in sources) or not is_done(context, stage):
            due.append(stage)
    return due


def check_inputs(context: Context, due: list[str]) -> None:
    """Raise `ConfigError` where a stage asked for reads what is not there, or is another recipe's, and is not due."""
    for stage in asked_stages(context):
        missing = [name for name in _stage_inputs(context, stage) if name not in due and not is_current(context, name)]
        if missing:
            raise ConfigError(f"stage {stage} lacks its input for this recipe", key="stages",
                              expected=f"{', '.join(missing)} among the stages", found=", ".join(context.config.stages))


def _model_digest(context: Context, name: str) -> str | None:
    paths = {TEACHER: context.teacher_path, SOURCE: context.source_path, "start": context.start_path}
    path = paths[name]()
    if path.is_relative_to(context.config.run_dir):  # a stage of this run made it
        manifest = Manifest.read(path.parent)
        return None if manifest is None else str(manifest.result["weights_digest"])
    return outside_digest(path)


def outside_digest(path: Path) -> str:
    """Digest of weights, tokenizer and shape of a model that no stage made; read again only where its files changed."""
    stamps = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns)
                   for file in sorted(path.iterdir() if path.is_dir() else ()) if file.is_file())
    return _outside_digest(path, stamps)


@lru_cache(maxsize=4)
def _outside_digest(path: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    """`stamps` of its files say whether it must be read again."""
    checkpoint = read_checkpoint(path)
    return digest_json([checkpoint.weights_digest, checkpoint.tokenizer_digest, checkpoint.arch.to_dict()])
