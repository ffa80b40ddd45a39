"""What the node `align` asks for: the model that is tuned, its trainings and their conversations. No torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import digest_files, read_json
from nemo_minitron.checkpoint.digest import read_checkpoint
from nemo_minitron.checkpoint.directory import CHAT_TEMPLATE
from nemo_minitron.config import AlignConfig, AlignPhaseConfig, Config, DataConfig, OptimConfig, TrainConfig
from nemo_minitron.data.conversations import read_conversations
from nemo_minitron.data.source import source_digest
from nemo_minitron.data.text import split_documents
from nemo_minitron.errors import ConfigError, DataError, UserError
from nemo_minitron.generate.answers import ANSWERS
from nemo_minitron.stages.context import Context
from nemo_minitron.training.budget import check_warmup, plan_phases

STAGE = "align"
MODEL = "align.model"
"""Stands for a model from elsewhere among the inputs of the stage."""
CONVERSATIONS = "conversations.jsonl"
"""The finished answers of the stage `generate`, in the folder of the training that reads them."""
_STARTS = {"distilled": "distill", "pruned": "prune", "teacher": "teacher"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """One training of the alignment, with all of its numbers in place; `path` is None where `source` is generate."""

    name: str
    source: str
    path: str | None
    tokens: int
    lr: float
    min_lr: float
    warmup_steps: int
    seq_length: int
    global_batch_size: int
    micro_batch_size: int

    def of(self, node: type[Any]) -> dict[str, Any]:
        """The numbers that a node of the recipe, or a step of the planner, has by the same names."""
        known = {field.name for field in dataclasses.fields(node)}
        return {name: value for name, value in dataclasses.asdict(self).items() if name in known}


def start_of(config: Config) -> str:
    """The stage whose model is tuned, or "teacher", or `MODEL` for a directory from elsewhere."""
    if config.align.model == "auto":
        return "prune" if "prune" in config.stages and "distill" not in config.stages else "distill"
    return _STARTS.get(config.align.model, MODEL)


def start_path(context: Context) -> Path:
    """Directory of the model that is tuned."""
    start = start_of(context.config)
    if start == "teacher":
        return context.teacher_path()
    return Path(context.config.align.model) if start == MODEL else context.stage_dir(start) / "checkpoint"


def align_inputs(config: Config) -> tuple[str, ...]:
    """The model, and the stage `generate` where a training is on its answers."""
    answers = any(phase.source == "generate" for phase in align_phases(config))
    return (start_of(config), *(["generate"] if answers else []))


def align_phases(config: Config) -> list[Tuning]:
    """The recipe's trainings; one, named answers, where `align.phases` lists none."""
    align, train, optim = config.align, config.train, config.optim
    known: dict[str, Any] = {
        "tokens": align.tokens, "lr": optim.lr, "min_lr": optim.min_lr, "warmup_steps": optim.warmup_steps,
        "seq_length": config.data.seq_length, "global_batch_size": train.global_batch_size,
        "micro_batch_size": train.micro_batch_size}

    def given(node: AlignConfig | AlignPhaseConfig) -> dict[str, Any]:
        return {name: value for name in known if (value := getattr(node, name)) is not None}

    def found(source: str, *parts: str | None) -> str | None:
        there = [part for part in parts if part is not None]
        return None if source == "generate" or parts[-1] is None else str(Path(*there))

    known |= given(align)
    if not align.phases:
        return [Tuning(name="answers", source=align.source, path=found(align.source, align.path), **known)]
    return [Tuning(name=phase.name, source=phase.source, path=found(phase.source, align.path, phase.path),
                   **known | given(phase)) for phase in align.phases]


def phase_context(context: Context, number: int) -> Context:
    """The recipe of one training: its conversations as data, its sizes and learning rate as those of all."""
    config, phase = context.config, align_phases(context.config)[number]
    align = config.align
    path = phase.path if phase.source == "file" else str(context.stage_dir(STAGE) / phase.name / CONVERSATIONS)
    data = DataConfig(kind="chat", path=path, num_heldout=align.num_heldout, heldout_fraction=align.heldout_fraction,
                      seq_length=phase.seq_length, packing=align.packing, chat_template=align.chat_template)
    return dataclasses.replace(context, config=dataclasses.replace(
        config, data=data, seed=config.seed + number, distill=dataclasses.replace(config.distill, phases=[]),
        optim=dataclasses.replace(config.optim, **phase.of(OptimConfig)),
        train=dataclasses.replace(config.train, **phase.of(TrainConfig))))


def what_is_tuned_on(config: Config) -> list[dict[str, Any]]:
    """The trainings as plain data with digests in place of paths, for the fingerprint."""
    align, template = config.align, config.align.chat_template
    if template is not None and Path(template).is_file():
        template = digest_files([Path(template)])
    shared = {"chat_template": template, "packing": align.packing, "num_heldout": align.num_heldout,
              "heldout_fraction": align.heldout_fraction}
    found = []
    for phase in align_phases(config):
        data = dataclasses.asdict(phase)
        path = data.pop("path")
        found.append(data | shared | {"digest": source_digest("chat", path)})
    return found


def take_answers(context: Context, number: int) -> None:
    """Write what the teacher has finished of its answers as conversations.

    An answer that was cut off, or says nothing, is left out.

    Raises:
        DataError: it has finished none.
    """
    lines = (context.stage_dir("generate") / ANSWERS).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    finished = [row for row in rows if row["finished"] and row["messages"][-1]["content"].strip()]
    if not finished:
        raise DataError("no answer of the teacher is finished", expected="answers that end before the limit",
                        found=f"{len(rows):,} that were cut off or empty",
                        key="generate.max_new_tokens, generate.stop or generate.prompts")
    path = context.stage_dir(STAGE) / align_phases(context.config)[number].name / CONVERSATIONS
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"messages": row["messages"]}, ensure_ascii=False) + "\n" for row in finished),
                    encoding="utf-8")
    context.say(f"[{STAGE}] {len(finished):,} of {len(rows):,} answers of the teacher are finished and are taken")


def check_align(context: Context, teacher: ArchSpec, student: ArchSpec) -> None:
    """Find what is wrong with the alignment before anything starts.

    Raises:
        UserError: a model, template or file that is not there or of another form, sizes that do not fit.
    """
    config, layout = context.config, context.layout
    start = start_of(config)
    if start == MODEL:
        student = read_checkpoint(Path(config.align.model)).arch
    elif start == "teacher":
        student = teacher
    _check_template(context)
    for number, phase in enumerate(align_phases(config)):
        tuned = phase_context(context, number)
        with keys_of_align(config, number):
            if phase.source == "file":
                if phase.path is None:
                    raise ConfigError("no conversations", expected="a file or folder, or source=generate", found="null",
                                      key="data.path")
                split_documents(read_conversations(Path(phase.path)), num_heldout=config.align.num_heldout,
                                heldout_fraction=config.align.heldout_fraction)
            tuned.check_seq_length(student)
            layout.check(student, name="aligned", seq_length=phase.seq_length)
            planned = plan_phases(phase.tokens, [], tuned.config.train, seq_length=phase.seq_length, dp=layout.dp)
            check_warmup(phase.warmup_steps, sum(part.steps for part in planned))
            if phase.min_lr > phase.lr:
                raise ConfigError("the learning rate ends above its peak", expected=f"at most {phase.lr:g}",
                                  found=f"{phase.min_lr:g}", key="optim.min_lr")


@contextmanager
def keys_of_align(config: Config, number: int) -> Iterator[None]:
    """Let the mistakes in a training name the keys of `align` that its data, sizes and learning rate come from."""
    place = f"align.phases[{number}]" if config.align.phases else "align"
    own = {"data.path": f"{place}.path", "data.seq_length": f"{place}.seq_length"}
    own |= {f"train.{name}": f"{place}.{name}" for name in ("global_batch_size", "micro_batch_size")}
    own |= {"optim.": f"{place}.", "data.": "align.", " or distill.phases": ""}
    try:
        yield
    except UserError as error:
        key = error.key
        for shared, mine in own.items():
            key = key.replace(shared, mine)
        raise error.with_key(key) from None


def _check_template(context: Context) -> None:
    """Raise `DataError` where neither the recipe nor the model's tokenizer has a chat template."""
    config, start = context.config, start_of(context.config)
    if config.align.chat_template is not None:
        if not Path(config.align.chat_template).is_file():
            raise DataError("no chat template", expected="a file with a Jinja template",
                            found=f"nothing at {config.align.chat_template}", key="align.chat_template")
        return
    if start == MODEL:
        directory = Path(config.align.model)
    elif start != "teacher" and config.prune.student is not None:
        directory = Path(config.prune.student)
    else:
        directory = context.start_path()  # what `initialize` makes has none, and is not there yet
    settings = directory / "tokenizer_config.json"
    beside = any((directory / name).exists() for name in (CHAT_TEMPLATE, "chat_template.json"))
    if not beside and not (settings.is_file() and "chat_template" in read_json(settings)):
        raise DataError("the tokenizer has no chat template", expected="a file with a Jinja template", found="null",
                        key="align.chat_template")
